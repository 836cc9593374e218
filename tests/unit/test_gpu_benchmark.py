"""The script for a GPU, exercised without one: every part at toy sizes, and parts that go wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu

    yield gpu
    for name in ("gpu", "_gpu", "_results"):
        sys.modules.pop(name, None)


def run(*words):
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=250)


def test_every_part_runs_at_toy_sizes(tmp_path, script):
    done = run("--dry-run", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert not [name for name, row in rows.items() if row["unit"] == "failed"]
    assert len(rows) == len(record["rows"]) > 20
    for word in ("attention by flash", "without gradients", "training step", "candidates", "fused loss", "projected"):
        assert any(word in name for name in rows), word
    whole = [row for name, row in rows.items() if "attention by" in name and "error" in name]
    assert len(whole) == 4
    assert all(0 < row["ours"] < 0.01 for row in whole)  # of bfloat16
    # the projection is arithmetic on its rows: four layers and a head, 464 times
    layer, head = (
        rows[f"{what} without gradients, 192 tokens"]["ours"] for what in ("1 layer", "output head and loss")
    )
    search = rows["default search, 464 forwards of 192 tokens, projected"]
    assert search["ours"] == pytest.approx(464 * (4 * layer + head) / 3600)
    per_token = 2 * (4 * (4 * 64 * 64 + 3 * 64 * 96) + 4 * 2 * 64 + 96 * 64)  # matrices, norms, head
    flops = 192 * per_token + 4 * 2 * 192**2 * 64
    assert search["peer"] == pytest.approx(464 * flops / (1e12 * 0.4) / 3600, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_says_so():
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks/gpu.py needs a CUDA device")
    assert done.stderr.count("\n") == 1


def test_a_part_that_goes_wrong_is_a_row(script):
    def fails():
        yield "before"
        raise RuntimeError("CUDA error: misaligned address\nand a long story")

    def dies():
        yield "before"
        os._exit(3)

    def hangs():
        yield "before"
        time.sleep(60)

    began = time.monotonic()
    assert list(script._in_process(fails, 30)) == ["before", "RuntimeError: CUDA error: misaligned address"]
    assert list(script._in_process(dies, 30)) == ["before", "its process ended with status 3"]
    assert list(script._in_process(hangs, 5)) == ["before", "ended after 5 s, its time"]
    assert list(script._in_process(hangs, 1)) == ["not begun, the time is spent"]
    assert time.monotonic() - began < 40
    assert script.failed("loss", "it broke").unit == "failed"


def test_a_case_that_goes_wrong_leaves_the_others(script):
    import _gpu

    def case():
        yield "row"
        raise torch.OutOfMemoryError("no memory\nat all")

    first, second = _gpu.tried("a case", case)
    assert (first, second.name, second.unit) == ("row", "a case: OutOfMemoryError: no memory", "failed")

    def greedy():
        raise torch.OutOfMemoryError("no memory")

    time_row, memory_row = _gpu.beside(_gpu.plan_for(True, False), "step", (2.0, 3_000_000_000), greedy)
    assert (time_row.ours, time_row.peer, memory_row.ours) == (2.0, None, 3.0)


def test_all_parts_end_in_nine_minutes(script):
    import _gpu

    assert set(script.SECONDS) == set(_gpu.PARTS)
    assert sum(script.SECONDS.values()) <= 60 * script.MINUTES < 9 * 60
