"""What is a credential, by name, by shape and by environment, and what only looks like one."""

import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from lightning_longrope.cli import LongRoPEParser
from lightning_longrope.commands import run_command
from lightning_longrope.redaction import MARK, redact, redact_all, redact_words

SECRET = "b7f1c0ffee" * 4


@pytest.mark.parametrize(
    "text",
    [
        "token: {}",
        "    hf_token: '{}'",
        '{{"api_key": "{}", "x": 1}}',
        "data.init_args.storage.secret_access_key: {}",
        "API-KEY={}",
        "longrope fit --data.init_args.token {} --seed 1",
        "longrope fit --data.init_args.password={} --seed 1",
        "longrope fit '--data.token={}'",
        "path: s3://user:{}@bucket/books",
        "file: https://host/x.zst?X-Amz-Signature={}&part=3",
        "- password: {}",
        "Authorization: {}",
        "curl -H 'x: Bearer {}' https://host",
        "auth: {}",
        "ssh_passphrase: {}",
        "wandb_key: {}",
        "longrope fit --data.storage-key={} --seed 1",
        '{{"encryption_key": "{}", "x": 1}}',
        "file: https://host/x.zst?token={}&part=3",
        "file: https://host/x.zst?part=3&auth_token={}&x=1",
        "file: https://host/x.zst?key={}&part=3",
        "file: https://host/x.zst?x-api-key={}&part=3",
        "file: https://host/x.zst?password={}&part=3",
        "file: https://host/x.zst?sig={}&part=3",
        "file: https://host/x.zst?X-Amz-Credential={}&part=3",
        "no run at /home/x/https:/user:{}@host/x",
    ],
)
def test_what_stands_behind_a_telling_name(text):
    found = redact(text.format(SECRET))
    assert SECRET not in found
    assert found.count(MARK) == 1
    before, after = text.format("\0").split("\0")
    assert found.startswith(before.rstrip("'\"").removesuffix("user:"))
    assert found.endswith(after.lstrip("'\""))


@pytest.mark.parametrize(
    "line",
    [
        "-",
        "--",
        "a-",
        "--token",
        "token",
        "?token",
        "://",
        "://x@",
        'token: "',
        "sk-",
        " ",
        "= ",
        "hf_",
        "password",
        "token: [",
        ",token",
        ", token: {",
        "--token.token",
        "token: '",
        "token:\n ",
        "- ",
    ],
)
def test_a_line_of_a_million_letters_takes_a_moment(line):
    began = time.process_time()
    redact(line * (1_000_000 // len(line)))
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "text",
    [
        "data:\n  password: |\n    two {0}\n\n    {0}\nseed: 1",
        "Got value: password: |-\n  two {0}\nseed: 1",
        "api_keys:\n- {0}\n- {0} more\nseed: 1",
        "x:\n- api_keys:\n  - {0}\n  -  {0}\nseed: 1",
        "a:\n  secrets:\n    first: {0}\n    second:\n      third: [{0}]\nseed: 1",
        "password: two {0}\nseed: 1",
        "password: two\n  {0}\nseed: 1",
        "password: 'it''s\n  {0}'\nseed: 1",
        "password: 'it''s {0}'\nseed: 1",
        'password: "a \\" {0}"\nseed: 1',
        "password: none, {0}\nseed: 1",
        "{{x: 1, password: two {0}, seed: 1}}",
        "{{secrets: {{a: {0}, b: {0}}}, seed: 1}}",
        "secrets.0: {0} {0}\nseed: 1",
        "longrope fit --data.api_keys+={0} --seed 1",
        "longrope fit --data.secrets.0 {0},{0} --seed 1",
        "api_keys+={0} seed: 1",
    ],
)
def test_a_value_is_hidden_as_far_as_it_goes(text):
    found = redact(text.format(SECRET))
    assert SECRET not in found
    assert MARK in found
    assert "two" not in found
    assert "seed: 1" in found or found.endswith("--seed 1")


def test_a_scheme_before_the_secret_goes_with_it():
    assert redact(f"headers: {{Authorization: Bearer {SECRET}, x: 1}}") == f"headers: {{Authorization: {MARK}, x: 1}}"


def test_lines_that_have_been_joined_are_hidden_to_their_end():
    assert redact(f"api_keys: - {SECRET} - other") == f"api_keys: {MARK}"


def test_errors_in_one_line_hide_what_stood_in_several(monkeypatch, capsys):
    text = f"It is:\n  password: |\n    two {SECRET}\n  api_keys:\n  - {SECRET}\n  - {SECRET}\n  seed: x"
    for error in (ValueError(text), OSError(text)):
        for noted in (error, type(error)("no")):
            noted.add_note(text)
            run = partial(raised, noted)
            monkeypatch.setattr("lightning_longrope.commands.command_of", lambda word, run=run: run)
            assert run_command("fit", []) == 2
            said = capsys.readouterr().err
            assert SECRET not in said
            assert f"It is: password: {MARK} api_keys: {MARK} seed: x" in said
    with pytest.raises(ValueError, match=f"^It is: password: {MARK} api_keys: {MARK} seed: x$"):
        LongRoPEParser().error(text)


def raised(error, *words):
    raise error


def test_lists_and_words_behind_a_telling_name():
    given = {"api_keys": [SECRET, SECRET], "password": f"{SECRET} and more", "n_tokens": "many"}
    assert redact_all(given) == {"api_keys": [MARK, MARK], "password": MARK, "n_tokens": "many"}


def test_lists_behind_a_telling_name():
    given = f"api_keys: ['{SECRET}', '{SECRET}']\n--data.tokens=['x'] --data.token ['{SECRET}'] --seed 1"
    assert redact(given) == f"api_keys: {MARK}\n--data.tokens=['x'] --data.token {MARK} --seed 1"


def test_words_of_a_command():
    secret = "two words"
    given = ["fit", f"--data.token={secret}", "--password", secret, "--api_keys", f"['{secret}', '{secret}']", "-c"]
    assert redact_words(given) == ["fit", f"--data.token={MARK}", "--password", MARK, "--api_keys", MARK, "-c"]
    for option in ("--data.api_keys+", "--x.secrets.0", "--x.secrets.of.b"):
        assert redact_words([f"{option}={secret}", option, secret]) == [f"{option}={MARK}", option, MARK]
    given = ["--tokenizer", "gpt2", "--data.eos_token", "</s>", "--token", "--seed=1", f"x=s3://me:{SECRET}@host"]
    assert redact_words(given) == [*given[:-1], f"x=s3://{MARK}@host"]


@pytest.mark.parametrize(
    "secret",
    ["hf_" + "aB3" * 11, "sk-proj-" + "x9" * 12, "AKIA" + "Q" * 16, "wandb_v1_" + "z" * 40, "glpat-" + "x-9" * 8]
    + [f"gh{kind}_" + "a" * 36 for kind in "pousr"]
    + ["github_pat_" + "1" * 22 + "_" + "b" * 59]
    + [f"xox{kind}-123456789012-abcDEF" for kind in "abp"],
)
def test_well_known_shapes_are_found_anywhere(secret):
    assert redact(f"see <{secret}>, twice {secret}") == f"see <{MARK}>, twice {MARK}"


def test_values_of_the_environment_are_found_anywhere(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plain words 1")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("DB_PASSWORD", SECRET + "+more")
    assert redact(f"a plain words 1 b {SECRET} c {SECRET}+more") == f"a {MARK} b {MARK} c {MARK}"
    for name in ("SOME_SERVICE_KEY", "GITLAB_PAT", "REGISTRY_AUTH", "KEY"):
        monkeypatch.setenv(name, f"what {name} holds")
        assert redact(f"a what {name} holds b") == f"a {MARK} b"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "rather false")
    assert redact("rather false") == "rather false"


@pytest.mark.parametrize(
    "text",
    [
        "token: null\nuse_auth_token: false\npassword: None",
        "eos_token: </s>\nbos_token: <s>\npad_token: '[PAD]'",
        "batch_tokens: 16384\nstart_tokens:\n- 0",
        "use_auth_token: false  # none is needed\n  x: 1",
        "{token: null, seed: 1}",
        '{\n  "token": null,\n  "seed": 1\n}',
        "tokenizer: meta-llama/Llama-2-7b-hf\npasskey_share: 0.35",
        "--data.batch_tokens 4096 --trainer.callbacks+=callbacks/passkey.yaml",
        "metric: passkey/1024",
        "author: me\nkey: value\nsort_key: 3\n{at_key: 1.5e-3, x_key: -2}\nauth: null",
        "monkey: banana\nkeyboard: us",
        "https://example.org/page?q=1#part",
        "class_path: lightning_longrope.callbacks.PasskeyRetrieval",
    ],
)
def test_what_only_looks_like_a_credential_stays(text):
    assert redact(text) == text


@pytest.mark.parametrize("folder", ["configs", "callbacks", "datamodules"])
def test_shipped_settings_hold_nothing_that_looks_like_a_credential(folder):
    files = sorted((Path(__file__).parents[2] / folder).rglob("*.yaml"))
    assert len(files) > 4
    for file in files:
        assert redact(file.read_text()) == file.read_text()
        settings = yaml.safe_load(file.read_text())
        assert redact_all(settings) == settings


def test_nested_values():
    assert redact_all({"secrets": {"a": "x", "b": [{"c": "y"}]}, "n": {"a": "x"}}) == {
        "secrets": {"a": MARK, "b": [{"c": MARK}]}, "n": {"a": "x"}}  # fmt: skip
    value = {"command": f"x --token {SECRET}", "n": 3, "list": [{"hf_token": "short"}, ("a", None)], "token": ["b", ""]}
    assert redact_all(value) == {
        "command": f"x --token {MARK}",
        "n": 3,
        "list": [{"hf_token": MARK}, ["a", None]],
        "token": [MARK, ""],
    }
