"""``longrope tokenize``: what it writes is what training opens, and ``--verify`` finds every kind of damage."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml
from small_tokenizers import TEXT, byte_level, sentencepiece_like

from lightning_longrope.commands import run_command
from lightning_longrope.datamodules import PackedTextDataModule, token_store
from lightning_longrope.datamodules.store_writing import FILES, manifest_checksum

FRAGMENT = Path(__file__).parents[2] / "datamodules/packed_text.yaml"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    byte_level().save_pretrained(home / "tokenizer")
    sentencepiece_like().save_pretrained(home / "foreign")
    for split in ("train", "val"):
        lines = [json.dumps({"text": f"{split} {number}. {TEXT}"}) for number in range(20)]
        (home / f"{split}.jsonl").write_text("\n".join([*lines, "broken", json.dumps({"text": ""})]))
    return home


def arguments(home, cache):
    return {
        "train_files": [str(home / "train.jsonl")],
        "val_files": [str(home / "val.jsonl")],
        "tokenizer": str(home / "tokenizer"),
        "cache_dir": str(cache),
        "on_error": "skip",
    }


def run(*words, capsys):
    status = run_command("tokenize", [str(word) for word in words])
    output = capsys.readouterr()
    return status, output.out, output.err


def config_of_a_run(home, data):
    return {"data": data, "model": {"name_or_path": "nowhere"}, "trainer": {"max_steps": 3}}


def stage(home, data):
    model = {"class_path": "lightning_longrope.LongRoPEModule", "init_args": {"name_or_path": str(home / "tokenizer")}}
    data["init_args"].pop("tokenizer")  # it is the model's
    return {"command": "fit", "model": model, "data": data}


@pytest.mark.parametrize("form", [lambda home, data: data, config_of_a_run, stage])
def test_a_configuration_s_stores_are_those_that_training_opens(home, tmp_path, capsys, form, monkeypatch):
    data = {"class_path": "lightning_longrope.datamodules.PackedTextDataModule", "init_args": arguments(home, tmp_path)}
    (tmp_path / "1-data.yaml").write_text(yaml.safe_dump(form(home, data)))
    status, out, _ = run("-c", tmp_path / "1-data.yaml", "--data.batch_size=3", capsys=capsys)
    assert status == 0
    lines = out.splitlines()
    assert len(lines) == 2
    assert all(re.search(r"20 documents, [\d,]+ tokens, skipped 1 empty, 1 malformed$", line) for line in lines)
    monkeypatch.setattr("lightning_longrope.datamodules.store_writing.parts", None)  # nothing is tokenised again
    datamodule = PackedTextDataModule(**arguments(home, tmp_path), seq_len=64)
    assert len(datamodule.documents("train")) == len(datamodule.documents("validation")) == 20
    assert {line.split(":")[0] for line in lines} == {str(path) for path in tmp_path.iterdir() if path.is_dir()}


@pytest.mark.distributed
def test_processes_write_the_same_store_and_the_fragment_is_a_configuration(home, tmp_path, capsys):
    given = {
        **arguments(home, tmp_path / "1"),
        "train_files": f"[{home / 'train.jsonl'}]",
        "val_files": f"[{home}/val*]",
    }
    options = [f"--data.{name}={value}" for name, value in given.items()]
    assert run("-c", FRAGMENT, *options, "--workers", 2, capsys=capsys)[0] == 0
    options[3] = f"--data.cache_dir={tmp_path / '0'}"
    assert run(f"--data={FRAGMENT}", *options, "--workers", 0, capsys=capsys)[0] == 0
    written = [sorted(path for path in (tmp_path / name).rglob("[!.]*") if path.is_file()) for name in "01"]
    assert len(written[0]) == 2 * (len(FILES) + 1)
    for one, other in zip(*written, strict=True):
        assert one.parent.name == other.parent.name
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs a datamodule"),
        (["-c", "missing.yaml"], "Cannot read 'missing.yaml'"),
        ([f"--data={FRAGMENT}", "--data.on_eror=skip"], "on_eror"),
        (["--verify", "nowhere"], "nowhere is no token store: it has no manifest.json"),
        (["--verify", "nowhere", "--data.seq_len=3"], "got --data.seq_len=3 too"),
        (["--tokenizer", "x", f"--data={FRAGMENT}"], "`--tokenizer` is for `--verify STORE`"),
        (["--data", "lightning_longrope.datamodules.SampleTextDataModule"], "keeps its tokens in memory: name a"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words, message, capsys):
    status, _, errors = run(*words, capsys=capsys)
    assert status == 2
    assert message in errors
    assert len(errors.splitlines()) == 1


def store(home, tmp_path):
    texts = [f"{number} {TEXT}" for number in range(9)]
    token_store.TokenStore.write(tmp_path / "store", texts, byte_level())
    return tmp_path / "store"


@pytest.mark.parametrize("name", [*FILES[:3], "manifest.json"])
def test_verify_finds_a_flipped_byte_anywhere(home, tmp_path, capsys, name, monkeypatch):
    monkeypatch.setattr("lightning_longrope.datamodules.store_writing.BLOCK", 1000)
    path = store(home, tmp_path) / name
    assert run("--verify", path.parent, "--tokenizer", home / "tokenizer", capsys=capsys)[:1] == (0,)
    data = path.read_bytes()
    places = [0, len(data) // 2, len(data) - 1] if name != "manifest.json" else [data.index(b"tokens") + 9]
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        status, _, errors = run("--verify", path.parent, capsys=capsys)
        assert status == 2
        assert len(errors.splitlines()) == 1
        assert f"{name} is damaged" in errors
        if name == "tokens.bin":
            first, last = map(int, re.search(r"bytes (\d+) to (\d+) are not", errors).groups())
            assert first <= place <= last < first + 1000


def test_verify_finds_files_that_are_short_or_missing_and_foreign_tokenizers(home, tmp_path, capsys):
    folder = store(home, tmp_path)
    data = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(data[:-2])
    (folder / "sources.bin").unlink()
    status, out, errors = run("--verify", folder, "--tokenizer", home / "foreign", capsys=capsys)
    assert (status, out) == (2, "")
    lines = errors.splitlines()
    assert len(lines) == 3
    assert re.search(r"was made with another tokenizer .* this one is .*foreign, of \d+", lines[0])
    assert f"tokens.bin is damaged: it has {len(data) - 2} bytes, but {len(data)} were written" in lines[1]
    assert "sources.bin is damaged: it is missing, but 18 were written" in lines[2]


def test_a_manifest_cannot_send_the_reader_out_of_its_folder(home, tmp_path):
    folder = store(home, tmp_path)
    (tmp_path / "secret").write_bytes(b"secret")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = manifest["files"].pop("skipped.jsonl")
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"the files \['\.\./secret', .*\] in place of"):
        token_store.TokenStore.open(folder, byte_level())


def test_the_manifest_s_checksum_is_a_plain_hash_of_its_other_entries(home, tmp_path):
    manifest = json.loads((store(home, tmp_path) / "manifest.json").read_text())
    checksum = manifest.pop("checksum")
    assert checksum == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
