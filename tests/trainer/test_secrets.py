"""Credentials planted in the environment, a configuration and a command line, looked for in every byte of a run."""

import base64
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from helpers import LLAMA
from lightning.pytorch import Callback

from lightning_longrope.redaction import MARK

pytest.importorskip("wandb")

ENVIRONMENT = {
    "HF_TOKEN": "planted in HF TOKEN/1",
    "WANDB_API_KEY": "e1" * 20,
    "AWS_SECRET_ACCESS_KEY": "planted+AWS/secret=2",
    "DB_PASSWORD": 'planted, database "password"',
}
IN_CONFIG = {"token": "planted-token-in-the-config", "password": "planted password: of a # config",
             "address": "https://me:planted-in-an-address@host/x?api_key=planted-in-a-query"}  # fmt: skip
SECRETS = [
    *ENVIRONMENT.values(),
    IN_CONFIG["token"],
    IN_CONFIG["password"],
    "planted-in-an-address",
    "planted-in-a-query",
]
IN_COMMAND = ["planted-on-the-command-line", "planted-in-a-url-on-the-command-line"]
MODEL = {**LLAMA, "vocab_size": 300, "hidden_size": 32, "max_position_embeddings": 64}


class Uploader(Callback):
    """Needs credentials, and a list of them, in its configuration."""

    def __init__(self, token: str, password: str, address: str, api_keys: list[str] | None = None) -> None:
        self.given = (token, password, address, api_keys)


def part(name, **arguments):
    return {"class_path": name, "init_args": arguments}


def recipe(folder):
    loggers = [part("lightning.pytorch.loggers.WandbLogger", project="windows"),
               part("lightning.pytorch.loggers.CSVLogger", save_dir="{out}/csv")]  # fmt: skip
    saver = part("lightning.pytorch.callbacks.ModelCheckpoint", dirpath="{out}/1-fit/checkpoints", save_last=True)
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "limit_val_batches": 1, "log_every_n_steps": 1,
               "num_sanity_val_steps": 0, "enable_progress_bar": False, "logger": loggers,
               "callbacks": [saver, part("test_secrets.Uploader", **IN_CONFIG)]}  # fmt: skip
    data = part("lightning_longrope.datamodules.SampleTextDataModule",
                seq_len=64, batch_size=2, vocab_size=300, cache_dir="{out}/data")  # fmt: skip
    fit = {"command": "fit", "trainer": trainer, "data": data, "model": {"init_args": {"config": MODEL}}}
    folder.mkdir()
    (folder / "1-fit.yaml").write_text(yaml.safe_dump(fit))
    (folder / "2-export.yaml").write_text(
        yaml.safe_dump({"command": "export", "run": "{out}/1-fit", "out": "{out}/hf"})
    )


def longrope(root, *words):
    """The command in a process of its own, whose words the system and wandb know; all that it says."""
    places = os.pathsep.join(str(Path(__file__).parents[up]) for up in range(3))
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": places, "WANDB_MODE": "offline",
                   "WANDB_DATA_DIR": str(root / "staging"), "WANDB_CACHE_DIR": str(root / "cache")}  # fmt: skip
    command = [sys.executable, "-m", "lightning_longrope", *words]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def forms(secret):
    """A secret as it is, in an address, in JSON, and in base64 wherever it begins among three bytes."""
    raw = secret.encode()
    yield from {raw, quote(secret, safe="").encode(), secret.replace('"', '\\"').encode()}
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + raw)
        yield encoded[-(-shift * 4 // 3) + (shift > 0) : len(encoded) - 4]


def test_the_search_finds_what_is_there():
    text = '<img src="data:;base64,{}">'
    for shift in range(3):
        hidden = text.format(base64.b64encode(b"x" * shift + SECRETS[0].encode() + b"tail").decode()).encode()
        assert any(form in hidden for form in forms(SECRETS[0]))


@pytest.mark.slow
def test_no_byte_of_a_run_and_no_word_it_says_holds_a_planted_credential(tmp_path):
    recipe(tmp_path / "recipe")
    words = [f"--trainer.callbacks.api_keys=['{IN_COMMAND[0]}']",
             f"--trainer.default_root_dir=s3://me:{IN_COMMAND[1]}@host/"]  # fmt: skip
    status, said = longrope(tmp_path, "run", "recipe", "--out", "out", *words)
    assert status == 0, said
    status, line = longrope(
        tmp_path, "data", "-c", "recipe/1-fit.yaml", f"--data.tokenizer=https://me:{IN_COMMAND[1]}@host/"
    )
    assert status == 2, line
    (tmp_path / "out" / "said.txt").write_text(said + line)
    files = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    files = {path: content for path, content in files.items() if path.parts[0] != "recipe"}
    names = {path.name for path in files}
    assert {
        "report.html",
        "run.json",
        "config.yaml",
        "README.md",
        "last.ckpt",
        "metrics.csv",
        "wandb-metadata.json",
    } <= names
    assert any(path.suffix == ".wandb" for path in files)
    for secret in (*SECRETS, *IN_COMMAND):
        found = [str(path) for path, content in files.items() if any(form in content for form in forms(secret))]
        assert not found, f"{secret!r} is in {found}"
    kept = yaml.safe_load(files[Path("out/1-fit/config.yaml")])["trainer"]["callbacks"][-1]["init_args"]
    assert kept == {
        "token": MARK,
        "password": MARK,
        "address": f"https://{MARK}@host/x?api_key={MARK}",
        "api_keys": [MARK],
    }
