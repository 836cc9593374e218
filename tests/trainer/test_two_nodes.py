"""A recipe on two hosts, killed, restarted, frozen and started again, ends as on one process, and repeats nothing.

start 1: node b freezes while the search runs; node a ends within the timeout and names it
start 2: the search goes on; in training the worker of b dies: both nodes start theirs again and go on by themselves;
    under ZeRO stage 3 node b loses its power: node a names it, and waits for it to come back
start 3: goes on to the end
"""

import csv
import json
import random
import re
import signal
import subprocess
import time
from contextlib import suppress

import pytest
import torch
import yaml
from helpers import tiny_llama
from small_tokenizers import TEXT, byte_level
from two_hosts import forbidden, launch, two_hosts, wait_until

from lightning_longrope import load_model
from lightning_longrope.__main__ import main

REASON = forbidden()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.two_nodes,
    pytest.mark.timeout(900),
    pytest.mark.skipif(REASON is not None, reason=f"this machine cannot make network namespaces: {REASON}"),
]
TIMEOUT = 20.0  # seconds
STEPS, SAVED_EVERY = 40, 4
ZERO3 = {
    "class_path": "lightning_longrope.strategies.LongContextDeepSpeedStrategy",
    "init_args": {"stage": 3, "zero": {"stage3_param_persistence_threshold": 0}},
}


def recipe(root, name, processes):
    """The stages for so many processes, with a batch of two rows over all of them."""
    base = {"init_args": {"name_or_path": str(root / "base")}}
    common = {"accelerator": "cpu", "devices": "auto", "enable_progress_bar": False, "enable_model_summary": False}
    common |= {"limit_val_batches": 1, "num_sanity_val_steps": 0}

    def stage(command, trainer, model, **others):
        data = {"files": [str(root / "text.jsonl")], "val_share": 0.2, "test_share": 0.2, "seq_len": 128}
        data |= {"tokenizer": str(root / "base"), "batch_size": 2 // processes, "cache_dir": "{out}/data"}
        packed = {"class_path": "lightning_longrope.datamodules.PackedTextDataModule", "init_args": data}
        watch = {"peers": {"timeout": TIMEOUT}}
        return {"command": command, "trainer": {**common, **trainer}, "model": model, "data": packed, **watch, **others}

    def fit(folder, strategy, **model):
        saver = {"dirpath": f"{{out}}/{folder}/checkpoints", "save_last": True, "save_top_k": 0}
        saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                 "init_args": {**saver, "every_n_train_steps": SAVED_EVERY}}  # fmt: skip
        logger = {"class_path": "lightning.pytorch.loggers.CSVLogger",
                  "init_args": {"save_dir": f"{{out}}/{folder}", "flush_logs_every_n_steps": 1}}  # fmt: skip
        trainer = {"strategy": strategy, "max_steps": STEPS, "log_every_n_steps": 1, "logger": logger}
        sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
        return stage("fit", {**trainer, "callbacks": [saver]}, {"init_args": {**model, "optimizer": sgd}})

    def callback(kind, **arguments):
        return {"class_path": f"lightning_longrope.callbacks.{kind}", "init_args": arguments}

    factors, tuned = "{out}/1-search/search/factors.json", "{out}/2-ddp/checkpoints/last.ckpt"
    search = callback("FactorSearch", target_length=128, documents=6, held_out=2, max_evaluations=64, batch_tokens=256)
    measuring = [
        callback("PerplexityByLength", lengths=[64, 128], documents=3, split="test"),
        callback("PasskeyRetrieval", lengths=[128], depths=2, trials=3, filler="text", split="test"),
    ]
    stages = {
        "1-search": stage("search", {"logger": False, "callbacks": [search]}, base),
        "2-ddp": fit("2-ddp", "auto", name_or_path=str(root / "base"), factors=factors),
        "3-zero3": fit("3-zero3", ZERO3 if processes > 1 else "auto", name_or_path=tuned),
        "4-compare": stage("compare", {"logger": False, "callbacks": measuring}, base, target_length=128,
                           methods=["none", "yarn"], tuned={"tuned": tuned}),
        "5-export": {"command": "export", "run": "{out}/3-zero3", "out": "{out}/hf", "tokenizer": str(root / "base")},
    }  # fmt: skip
    (root / name).mkdir()
    for title, content in stages.items():
        (root / name / f"{title}.yaml").write_text(yaml.safe_dump(content))
    return str(root / name)


def losses(out, stage):
    """Loss by step, of all starts of a stage; a step that was run twice must have come out the same."""
    found = {}
    for path in sorted(out.glob(f"{stage}/lightning_logs/*/metrics.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            if row["train_loss"]:
                loss = float(row["train_loss"])
                assert found.setdefault(int(row["step"]), loss) == pytest.approx(loss, rel=1e-5)
    return found


def history(out):
    path = out / "1-search" / "search" / "history.jsonl"
    return path.read_bytes() if path.exists() else b""


class Runs:
    """What came of the three starts."""

    def __init__(self, root):
        self.root, self.out, self.seconds, self.codes, self.cut = root, root / "two", {}, {}, b""

    def log(self, start, node):
        return (self.root / start / f"{node}.log").read_text()

    def wait_until(self, ready, processes):
        try:
            wait_until(ready, processes)
        except AssertionError as error:
            texts = [path.read_text()[-3000:] for path in sorted(self.root.glob("start*/*.log"))]
            raise AssertionError("\n".join([str(error), *texts])) from None

    def finish(self, name, processes):
        begin = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            self.codes[name] = [process.wait(200) for process in processes]
        self.seconds[name] = time.monotonic() - begin

    def step(self, stage):
        """The last step that a stage has logged."""
        return max(losses(self.out, stage), default=-1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("nodes")
    draws, lines = random.Random(0), TEXT.splitlines()
    texts = ["\n".join(draws.sample(lines, 40)) for _ in range(60)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tiny_llama(vocab_size=720, max_position_embeddings=64).save_pretrained(root / "base")
    byte_level().save_pretrained(root / "base")
    runs, words = Runs(root), ["run", recipe(root, "recipe", 2), "--out", str(root / "two"), "--seed", "3"]
    with two_hosts() as hosts:
        first = launch(hosts, words, root / "start1", MASTER_PORT="29501")
        runs.wait_until(lambda: history(runs.out).count(b"\n") > 12, first)
        hosts[1].signal(signal.SIGSTOP)
        runs.finish("frozen", first[:1])
        runs.cut = history(runs.out)
        hosts[1].signal(signal.SIGKILL)
        second = launch(hosts, words, root / "start2", MASTER_PORT="29502", MAX_RESTARTS="1")
        runs.wait_until(lambda: (runs.out / "2-ddp" / "checkpoints" / "last.ckpt").exists(), second)
        hosts[1].signal(signal.SIGKILL, only="LOCAL_RANK=")  # the worker, not its agent
        runs.wait_until(lambda: runs.step("3-zero3") > 6, second)
        hosts[1].signal(signal.SIGKILL)
        begin = time.monotonic()
        runs.wait_until(lambda: len(said(runs.log("start2", "a"))) == 2, second[:1])
        runs.seconds["killed"] = time.monotonic() - begin
        hosts[0].signal(signal.SIGKILL)
        third = launch(hosts, words, root / "start3", MASTER_PORT="29503")
        runs.finish("last", third)
    alone = recipe(root, "recipe1", 1)
    assert main(["run", alone, "--out", str(root / "one"), "--seed", "3"]) == 0
    return runs


def said(text):
    return [line for line in text.splitlines() if "longrope: error:" in line]


def test_a_frozen_node_ends_the_run_within_the_timeout_and_is_named(runs):
    assert runs.codes["frozen"] == [1], runs.log("start1", "a")[-3000:]
    assert TIMEOUT / 2 < runs.seconds["frozen"] < TIMEOUT + 10  # in which torchrun ends too
    (line,) = said(runs.log("start1", "a"))
    assert re.search(r"rank 1 \(node-b, 10.77.0.2\) has not answered for \d+ s", line)
    assert "lightning_longrope/" not in runs.log("start1", "a")  # no trace of ours beside it


def test_a_node_that_loses_its_power_is_named_at_once(runs):
    assert runs.seconds["killed"] < TIMEOUT / 2
    assert "rank 1 (node-b, 10.77.0.2) is gone" in said(runs.log("start2", "a"))[1]


def test_a_worker_that_dies_is_started_again_and_training_goes_on(runs):
    text = runs.log("start2", "a")
    assert len(said(text)) == 2
    assert "rank 1 (node-b, 10.77.0.2) is gone" in said(text)[0]
    assert text.count("[1/5] 1-search is finished, skipped") == 1
    assert text.count("[2/5] 2-ddp (fit)") == 2
    assert "Restored all states from the checkpoint" in text


def test_a_search_that_was_cut_on_two_nodes_is_that_of_one_process_bit_for_bit(runs):
    whole, alone = ([json.loads(line) for line in history(runs.root / out).splitlines()] for out in ("two", "one"))
    assert history(runs.out).startswith(runs.cut)
    assert 12 < runs.cut.count(b"\n") < len(whole)
    for one, other in zip(whole, alone, strict=True):
        for name in ("seconds", "crc"):
            one.pop(name, None), other.pop(name, None)
        assert one == other
    tables = [(runs.root / out / "1-search" / "search" / "factors.json").read_bytes() for out in ("two", "one")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("stage", ["2-ddp", "3-zero3"])
def test_training_on_two_nodes_and_again_is_that_of_one_process(runs, stage):
    two, one = losses(runs.out, stage), losses(runs.root / "one", stage)
    assert sorted(one) == list(range(STEPS))
    # Lightning logs the loss of a step after its checkpoint: a kill between the two leaves that row out
    unlogged = set(one) - set(two)
    assert len(unlogged) <= 1
    assert all((step + 1) % SAVED_EVERY == 0 for step in unlogged)
    for step, loss in two.items():
        assert loss == pytest.approx(one[step], rel=1e-4)
    starts = [path.read_text().splitlines()[1:] for path in sorted(runs.out.glob(f"{stage}/*/*/metrics.csv"))]
    assert len(starts) == 2
    assert len(starts[1]) < STEPS  # it did not begin anew


def test_evaluation_and_export_are_those_of_one_process(runs):
    assert runs.codes["last"] == [0, 0]
    two, one = (
        list(csv.DictReader((runs.root / out / "results.csv").read_text().splitlines())) for out in ("two", "one")
    )
    assert len(two) == len(one) > 20
    for ours, theirs in zip(two, one, strict=True):
        assert {**ours, "value": 0, "low": 0, "high": 0} == {**theirs, "value": 0, "low": 0, "high": 0}
        assert float(ours["value"]) == pytest.approx(float(theirs["value"]), rel=1e-4)
    tokens = torch.arange(120)[None]
    logits = [load_model(str(runs.root / out / "hf")).eval()(tokens).logits for out in ("two", "one")]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_only_the_first_rank_writes_and_finished_stages_are_run_once(runs):
    done = json.loads((runs.out / "run.json").read_text())
    assert [stage["status"] for stage in done["stages"]] == ["finished"] * 5
    started = "".join(runs.log(start, "a") for start in ("start1", "start2", "start3"))
    assert [started.count(f"] {name} (") for name in ("1-search", "2-ddp", "3-zero3", "4-compare", "5-export")] == [
        2, 2, 2, 1, 1]  # fmt: skip
    assert all("/5] " not in runs.log(start, "b") for start in ("start1", "start2", "start3"))
    assert not list(runs.out.rglob("*.partial")) + list(runs.out.glob(".seen-*"))
