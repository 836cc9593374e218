"""The script for a GPU, exercised without one: every part at toy sizes, and parts that go wrong."""

import json
import os
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes

from lightning_longrope import long_rows
from lightning_longrope.model import hidden_states

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for name in ("TOKENS", "TILE", "GROUP"):  # which toy sizes change
        monkeypatch.setattr(long_rows, name, getattr(long_rows, name))
    before = set(sys.modules)
    import gpu

    yield gpu
    for name in set(sys.modules) - before:
        if str(SCRIPT.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def memory(monkeypatch):
    """Counts storages in place of a GPU's allocator."""
    with LiveBytes(torch.nn.Module()) as live:
        counts = {
            "memory_allocated": lambda: live.now,
            "max_memory_allocated": lambda: live.most,
            "reset_peak_memory_stats": lambda: setattr(live, "most", live.now),
            "mem_get_info": lambda: (60e9, 100e9),
            "synchronize": lambda: None,
        }
        for name, count in counts.items():
            monkeypatch.setattr(torch.cuda, name, count)
        yield live


def counted(plan):
    """The plan, with what has been put in place of an allocator asked for memory."""

    class Counted(type(plan)):
        gpu = True

    return Counted(**vars(plan))


def run(*words):
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=250)


def test_every_part_runs_at_toy_sizes(tmp_path, script):
    done = run("--dry-run", "--check", "--out", str(tmp_path / "gpu.json"))
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
    # the projection is arithmetic on its rows: four layers and a head, 352 times
    layer, head = (
        rows[f"{what} without gradients, 192 tokens"]["ours"] for what in ("1 layer", "output head and loss")
    )
    search = rows["default search, 352 forwards of 192 tokens, projected"]
    assert search["ours"] == pytest.approx(352 * (4 * layer + head) / 3600)
    per_token = 2 * (4 * (4 * 64 * 64 + 3 * 64 * 96) + 4 * 2 * 64 + 96 * 64)  # matrices, norms, head
    flops = 192 * per_token + 4 * 2 * 192**2 * 64
    assert search["peer"] == pytest.approx(352 * flops / (1e12 * 0.4) / 3600, rel=0.01)


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
    assert script.told(script._in_process(lambda: iter(["2 cores", 1e12]), 30)) == ("2 cores", 1e12)
    assert script.told(script._in_process(fails, 30)) == ("before", None)


def test_what_failed_or_never_came_is_a_miss(script, monkeypatch, tmp_path, capsys):
    import _gpu
    import _gpu_plan

    def broken(plan):
        raise RuntimeError("CUDA error: unspecified launch failure")
        yield

    for name in _gpu.PARTS:
        monkeypatch.setitem(_gpu.PARTS, name, broken)

    def lost():
        raise RuntimeError("CUDA error: the device is lost")

    monkeypatch.setattr(sys.modules["_results"], "machine", lost)  # which a process of its own has asked before
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--check", "--out", str(out)])
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as the script sets it
    assert script.main() == 1
    rows = json.loads(out.read_text())["rows"]
    assert {row["unit"] for row in rows} == {"failed"}
    assert [row["name"].split(":")[0] for row in rows[:5]] == list(_gpu.PARTS)
    assert [row["goal"] for row in rows[5:]] == ["<= 0.02"] * 2  # of flash attention at both lengths
    assert capsys.readouterr().out.count("MISS") == len(rows) == 7

    plan = _gpu_plan.plan_for(True, False)
    one_failed = [_gpu_plan.failed("a part", "it broke")]
    met = [_gpu_plan.Row(name, 0.0, None, "", 0.0, goal) for name, goal in _gpu_plan.goals(plan).items()]
    assert _gpu_plan.missing(plan, met) == []
    assert [row.met for row in _gpu_plan.missing(plan, met[1:]) + one_failed] == [False, False]


def test_the_goals_of_a_whole_run(script):
    import _gpu_plan

    plan = counted(_gpu_plan.Plan("cpu", _gpu_plan.LLAMA_2_7B))
    goals = _gpu_plan.goals(plan)
    wanted = {
        "default search, 352 forwards of 131,072 tokens, projected": "<= 1.25",
        "taken from the card with the weights of all layers, 2,097,152 tokens": "<= 141",
        "fused loss, 8,192 tokens x 32,000, width 1,024: peak memory (share)": "<= 0.25",
        "checkpointed loss, 8,192 tokens x 131,072, width 1,024: peak memory (share)": "<= 0.125",
    }
    assert wanted.items() <= goals.items()
    assert "attention by flash, 262,144 tokens: error of the largest value" in goals
    # a GPU that one cannot ask any more leaves nothing to project, and that is a miss
    assert _gpu_plan.projection(plan, [], None) == []
    figures = [("1 layer without gradients", 0.5), ("output head and loss without gradients", 1.0)]
    rows = [_gpu_plan.Row(f"{name}, 131,072 tokens", value, None, "s", value) for name, value in figures]
    (search,) = _gpu_plan.projection(plan, rows, 989e12)
    assert search.ours == pytest.approx(352 * (32 * 0.5 + 1) / 3600)
    assert search.ratio == pytest.approx(17 / (6.2e15 / (0.4 * 989e12)), rel=0.01)  # operations as published
    assert search.met is True
    assert _gpu_plan.projection(plan, rows, 2 * 989e12)[0].met is False


@pytest.mark.parametrize("vocabulary", [8, 4096])  # with a small one the layer takes most, else the head
def test_the_peak_of_a_window_is_that_of_layer_and_head(vocabulary, script, memory):
    import _gpu
    import _gpu_plan

    plan = _gpu_plan.plan_for(True, False)
    plan = replace(plan, fields={**plan.fields, "vocab_size": vocabulary}, repeats=0)
    model, length = _gpu.built(plan, 1), 256
    tokens, hidden = _gpu.tokens_of(plan, length), torch.zeros(length, 64, dtype=torch.bfloat16)

    def most_of(work):
        before = memory.most = memory.now
        with torch.no_grad():
            work()
        return memory.most - before

    layer = most_of(lambda: hidden_states(model, tokens))
    head = most_of(lambda: _gpu.flat_token_nll(hidden, _gpu.output_head(model), tokens[0]))
    assert (layer > head) == (vocabulary == 8)
    before = memory.now
    rows = {row.name: row for row in _gpu.one_layer(counted(plan), model, length)}
    peak = 1e9 * rows["peak with the weights of all layers, 256 tokens"].ours - before
    assert max(layer, head) <= peak <= max(layer, head) + 2 * hidden.nbytes  # its tokens, the head's hidden states
    assert rows["taken from the card with the weights of all layers, 256 tokens"].ours == 40


def test_gradients_of_earlier_runs_are_no_part_of_what_was_there(script, memory):
    import _gpu
    import _gpu_plan

    plan = counted(replace(_gpu_plan.plan_for(True, False), repeats=2))
    weight, states = torch.randn(64, 96).requires_grad_(), torch.randn(8, 64).requires_grad_()
    cost = _gpu.measured(plan, lambda: (states @ weight).sum().backward(), [weight, states])
    assert cost.added >= weight.nbytes + states.nbytes
    assert (weight.grad, states.grad) == (None, None)

    case = replace(plan.losses[0], tokens=16)  # few tokens: gradients are most of it
    rows = {row.name: row for row in _gpu.one_loss(type(plan)(**vars(plan) | {"losses": (case,)}), case, "fused")}
    share = rows["fused loss, 16 tokens x 96, width 64: peak memory (share)"]
    gradients = 2 * (96 * 64 + 16 * 64)
    assert min(1e9 * share.ours, 1e9 * share.peer) >= gradients
    assert share.goal == "<= 0.25"

    model = _gpu.built(plan, 2)
    stock, gradients = deepcopy(model), sum(p.nbytes for p in model.parameters())
    rows = {row.name: row for row in _gpu.training(plan, model, stock, _gpu.tokens_of(plan, 8))}
    step = rows["2 layers, training step, 8 tokens: peak memory"]
    assert min(1e9 * step.ours, 1e9 * step.peer) >= gradients
    assert all(p.grad is None for net in (model, stock) for p in net.parameters())


def test_long_work_is_repeated_less(script, monkeypatch):
    import _gpu
    import _gpu_plan

    plan, clock = replace(_gpu_plan.plan_for(True, False), repeats=3, enough=1.0), [0.0]
    monkeypatch.setattr(_gpu, "perf_counter", lambda: clock[-1])
    for seconds, times in ((0.1, 4), (0.6, 3), (5.0, 2)):  # with the first, which does not count
        done = len(clock)
        _gpu.measured(plan, lambda seconds=seconds: clock.append(clock[-1] + seconds))
        assert len(clock) - done == times


def test_a_case_that_goes_wrong_leaves_the_others(script):
    import _gpu
    from _gpu_plan import plan_for

    def case():
        yield "row"
        raise torch.OutOfMemoryError("no memory\nat all")

    first, second = _gpu.tried("a case", case)
    assert (first, second.name, second.unit) == ("row", "a case: OutOfMemoryError: no memory", "failed")

    def greedy():
        raise torch.OutOfMemoryError("no memory")

    time_row, memory_row = _gpu.beside(plan_for(True, False), "step", _gpu.Cost(2.0, 3_000_000_000), greedy)
    assert (time_row.ours, time_row.peer, memory_row.ours) == (2.0, None, 3.0)


def test_all_parts_end_in_nine_minutes(script):
    import _gpu

    assert set(script.SECONDS) == {*_gpu.PARTS, "device"}
    assert sum(script.SECONDS.values()) <= 60 * script.MINUTES < 9 * 60
