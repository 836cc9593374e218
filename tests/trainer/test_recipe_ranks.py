"""A recipe on two processes of a launcher: they agree on what is finished, one writes, and mistakes are said once."""

import json
import os
import re
from contextlib import chdir, redirect_stderr
from types import SimpleNamespace

import pytest
import yaml
from helpers import LLAMA, tiny_llama
from lightning.pytorch.utilities import rank_zero_only
from processes import run_ranks
from small_tokenizers import TEXT, byte_level

from lightning_longrope.__main__ import main
from lightning_longrope.cli import take_launched_processes
from lightning_longrope.commands import export, recipe

TRAINER = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 1}


def write(root, name, seq_len=32):
    """A stage that trains a little, and one that exports."""
    saver = {"dirpath": "{out}/1-train/checkpoints", "save_last": True, "save_top_k": 0, "every_n_train_steps": 1}
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver}
    trainer = {**TRAINER, "devices": "auto", "max_steps": 5, "logger": False, "callbacks": [saver]}
    data = {"train_files": [str(root / "text.jsonl")], "val_files": [str(root / "val.jsonl")], "seq_len": seq_len}
    data |= {"tokenizer": str(root / "base"), "cache_dir": "{out}/data"}
    stages = {
        "1-train": {
            "command": "fit",
            "trainer": {**trainer, "num_sanity_val_steps": 0},
            "model": {"init_args": {"config": {**LLAMA, "vocab_size": 720}}},
            "data": {"class_path": "lightning_longrope.datamodules.PackedTextDataModule", "init_args": data},
            "short": {"trainer.max_steps": 2},
        },
        "2-export": {"command": "export", "run": "{out}/1-train", "out": "{out}/hf", "tokenizer": str(root / "base")},
    }
    (root / name).mkdir(exist_ok=True)
    for title, stage in stages.items():
        (root / name / f"{title}.yaml").write_text(yaml.safe_dump(stage))
    return str(root / name)


def run_all(root, part):
    rank = int(os.environ["RANK"])
    rank_zero_only.rank = rank  # a process of its own reads it from its environment
    real, exports = export.export_checkpoint, []
    recipe.export_checkpoint = lambda **words: exports.append(1) or real(**words)
    found = {}

    def run(name, words):
        with (root / f"{name}{rank}.err").open("w") as file, redirect_stderr(file):
            found[name] = main(words)

    short = ["run", str(root / "recipe"), "--short", "--seed", "7", "--out", str(root / "out")]
    if part == "runs":
        run("short", short)
        run("again", short)
    elif part == "changed":
        run(part, [*short[:-3], "8", *short[-2:]])
    elif part == "other":
        run(part, [short[0], str(root / ("recipe" if rank else "other")), *short[2:-1], str(root / "out2")])
    else:
        with chdir(root / f"node{rank}"):  # a folder of the same name that the nodes do not share
            run(part, [*short[:-1], "out"])
    (root / f"{part}{rank}").write_text(json.dumps([found, len(exports)]))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes came to with several commands, one after the other."""
    root = tmp_path_factory.mktemp("ranks")
    for name, lines in {"text": TEXT.splitlines()[10:], "val": TEXT.splitlines()[:10]}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for rank in range(2):
        (root / f"node{rank}").mkdir()
    tiny_llama(vocab_size=720).save_pretrained(root / "base")
    byte_level().save_pretrained(root / "base")
    write(root, "recipe")
    write(root, "other", seq_len=24)
    codes, exports = [{}, {}], []
    for part in ("runs", "changed", "other", "unshared"):
        run_ranks(2, run_all, root, part, logs=root / part, timeout=100)
        for rank in range(2):
            found, count = json.loads((root / f"{part}{rank}").read_text())
            codes[rank] |= found
            exports += [count]
    texts = {path.stem: path.read_text() for path in root.glob("*.err")}
    return SimpleNamespace(root=root, codes=codes, exports=exports, texts=texts)


def said(text):
    return [line for line in text.splitlines() if line.startswith("longrope: error:")]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_run_a_recipe_and_one_writes(found):
    assert [codes["short"] for codes in found.codes] == [0, 0]
    assert found.exports == [1, 0] + 6 * [0]
    record = json.loads((found.root / "out" / "run.json").read_text())
    assert [stage["status"] for stage in record["stages"]] == ["finished", "finished"]
    assert yaml.safe_load((found.root / "out" / "1-train" / "config.yaml").read_text())["seed_everything"] == 7
    assert "[2/2] 2-export (export)" in found.texts["short0"]
    assert "/2]" not in found.texts["short1"]
    assert not list((found.root / "out").glob(".seen-*"))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_agree_on_what_is_finished_and_refuse_together(found):
    assert [codes["again"] for codes in found.codes] == [0, 0]
    assert found.texts["again0"].count("is finished, skipped") == 2
    assert [codes["changed"] for codes in found.codes] == [2, 2]
    (line,) = said(found.texts["changed0"] + found.texts["changed1"])
    assert "was finished in" in line


@pytest.mark.slow
@pytest.mark.distributed
def test_nodes_with_different_recipes_or_folders_are_refused(found):
    assert [codes["other"] for codes in found.codes] == [1, 2]
    assert "has another recipe than the first node" in said(found.texts["other1"])[0]
    assert not (found.root / "out2" / "1-train").exists()
    assert [codes["unshared"] for codes in found.codes] == [1, 2]
    (line,) = said(found.texts["unshared1"])
    assert "does not see" in line
    assert "a file system that all nodes share" in line


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"devices": "auto", "num_nodes": 1}, (2, 4)),
        ({"devices": -1, "num_nodes": 2}, (2, 4)),
        ({"devices": 4, "num_nodes": 1}, (2, 4)),
        ({"devices": [0, 1, 2, 3], "num_nodes": 2}, (2, [0, 1, 2, 3])),
        ({"devices": 1, "num_nodes": 1}, None),
        ({"devices": "auto", "num_nodes": 4}, None),
    ],
)
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_a_configuration_takes_the_processes_that_were_started(given, taken, launcher, monkeypatch):
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1"}
    slurm = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "long"}
    for name, value in (torchrun if launcher == "torchrun" else slurm).items():
        monkeypatch.setenv(name, value)
    trainer = SimpleNamespace(**given)
    if taken is None:
        with pytest.raises(ValueError, match=re.escape("2 node(s) with 4 process(es) each were started")):
            take_launched_processes(trainer)
    else:
        take_launched_processes(trainer)
        assert (trainer.num_nodes, trainer.devices) == taken


def test_without_a_launcher_a_configuration_stays_as_it_is():
    trainer = SimpleNamespace(devices=1, num_nodes=1)
    take_launched_processes(trainer)
    assert vars(trainer) == {"devices": 1, "num_nodes": 1}
