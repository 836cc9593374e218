"""Full disks, read-only folders and vanished files: one line that names the path, and nothing lost."""

import errno
import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_tokenizers import byte_level

from lightning_longrope.__main__ import main
from lightning_longrope.commands import run_command
from lightning_longrope.datamodules.token_store import TokenStore
from lightning_longrope.files import naming, write_whole

TESTS = Path(__file__).parents[1]


def forbidden():
    """Whether this machine lets nobody mount a disk of its own."""
    words = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(words, capture_output=True, check=False).returncode != 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(forbidden(), reason="no mount namespaces here")
def test_a_run_on_a_disk_that_is_full_again_and_again_ends_as_with_space(tmp_path):
    words = ["unshare", "-m", sys.executable, "-m", "torture.small_disk", str(tmp_path), "400000"]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    full = [said for _, code, said in runs if code == 2]
    assert {code for _, code, _ in runs} == {0, 2}
    assert len(full) >= 3
    for (line,) in full:
        assert line.startswith(f"longrope: error: No space left on device: {tmp_path}/disk/cut/")
        assert line.endswith("Make space there and give the same command again.")


@contextmanager
def no_larger_than(size):
    """Lets files grow to so many bytes: the system's error of a full disk, but for its number, on any machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_whole(path, lambda file: file.write(bytes(1 << 20))),
        lambda path: write_whole(path, lambda file: torch.save({"a": torch.ones(1 << 18)}, file)),
        lambda path: save_file({"a": torch.ones(1 << 18)}, path),
    ],
)
def test_the_system_s_errors_name_the_file_whoever_writes_it(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("earlier")
    with no_larger_than(1 << 16), pytest.raises(OSError, match=str(path)) as error, naming(path):
        write(path)
    assert error.value.errno == errno.EFBIG
    assert path.read_text() == "earlier"


def test_a_file_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    def fails(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.json"
    path.write_text("earlier")
    with pytest.raises(OSError, match=r"a\.json"):
        write_whole(path, fails)
    assert path.read_text() == "earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


READ_ONLY = """
import subprocess, sys
from lightning_longrope.__main__ import main
subprocess.run(["mount", "--bind", "-o", "ro", sys.argv[1], sys.argv[1]], check=True)
codes = [main(["search", "--model.config", "{model_type: llama, vocab_size: 99}", "--data",
               "lightning_longrope.datamodules.SampleTextDataModule", "--trainer.callbacks",
               "lightning_longrope.callbacks.FactorSearch", "--out", sys.argv[1] + "/run"]),
         main(["export", sys.argv[1] + "/model", sys.argv[1] + "/hf"])]
sys.exit(0 if codes == [2, 2] else 1)
"""


@pytest.mark.distributed
@pytest.mark.skipif(forbidden(), reason="no mount namespaces here")
def test_a_read_only_folder_is_named(tmp_path):
    from helpers import tiny_llama

    tiny_llama().save_pretrained(tmp_path / "model")
    words = ["unshare", "-m", sys.executable, "-c", READ_ONLY, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith(("longrope: error", "Traceback"))]
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith(f"longrope: error: Read-only file system: {tmp_path}/run")
    assert lines[1].startswith(f"longrope: error: Read-only file system: {tmp_path}/.hf.lock")
    assert done.returncode == 0


@pytest.mark.parametrize("lost", ["text.jsonl", "data/*/tokens.bin", "data/*/documents.bin", "last.ckpt"])
def test_a_file_that_has_vanished_is_named(tmp_path, lost, capfd):
    byte_level().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.jsonl").write_text('{"text": "the garden of the miller"}\n' * 50)
    data = ["--data", "lightning_longrope.datamodules.PackedTextDataModule", f"--data.tokenizer={tmp_path}/tokenizer"]
    data += [f"--data.train_files=[{tmp_path}/text.jsonl]", f"--data.cache_dir={tmp_path}/data", "--data.seq_len=16"]
    if lost.startswith("data"):
        assert main(["tokenize", *data]) == 0
        (path,) = tmp_path.glob(lost)
    else:
        path = tmp_path / lost
    path.unlink(missing_ok=True)
    capfd.readouterr()
    command = ["export", str(path), str(tmp_path / "hf")] if lost == "last.ckpt" else ["data", *data]
    assert main(command) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("longrope: error: ")]
    assert str(path) in line


def test_the_remedy_is_that_of_the_error(monkeypatch, capfd):
    def fails(command, arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/there/a.json")

    monkeypatch.setattr("lightning_longrope.commands.command_of", lambda word: fails)
    assert run_command("report", []) == 2
    assert capfd.readouterr().err == (
        "longrope: error: Read-only file system: /there/a.json. Choose another folder, or change who may write.\n"
    )


def test_a_store_that_lost_a_file_while_it_is_read_goes_on(tmp_path):
    store = TokenStore.write(tmp_path / "store", ["of the miller"] * 9, byte_level())
    for path in (tmp_path / "store").iterdir():
        path.unlink()
    assert len(set(store.tokens.tolist())) > 3
