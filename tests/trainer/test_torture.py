"""The real command line, killed at some moments: the short version of ``make torture``."""

import random

import pytest
import torch
from torture import comparing
from torture.killing import Moment, TortureError, Uncut, draw, parts_of
from torture.rounds import Torture

MOMENTS = {  # one in the midst of a checkpoint, one in a search, one told to stop, one in the export
    "tokenize": Moment("tokenize", 3, 0.0, "SIGKILL", group=False),
    "1-pretrain": Moment("1-pretrain", 15, 0.0, "SIGKILL", group=True),
    "2-search": Moment("2-search", 20, 0.0, "SIGTERM", group=False),
    "5-export": Moment("5-export", 6, 0.0, "SIGKILL", group=True),
}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_command_line_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setattr("torture.rounds.draw", lambda *arguments: list(MOMENTS.values()))
    torture = Torture(tmp_path, tuple(MOMENTS), short=True)
    torture.round(0, len(MOMENTS), seed=0)
    assert torture.tally.failures == []
    assert torture.tally.fired == list(MOMENTS.values())


def test_moments_are_spread_over_all_parts(tmp_path):
    parts = parts_of(tmp_path)
    moments = draw(parts, {part.name: Uncut(10, 1.0) for part in parts}, 32, random.Random(0))
    assert [moment.part for moment in moments] == [part.name for part in parts for _ in range(4)]
    assert {moment.signal for moment in moments} == {"SIGKILL", "SIGTERM"}
    assert moments == draw(parts, {part.name: Uncut(10, 1.0) for part in parts}, 32, random.Random(0))


def small_run(out):
    """A folder such as a run leaves."""
    (out / "a" / "checkpoints").mkdir(parents=True)
    (out / "a" / "done.json").write_text('{"seconds": 1}')
    torch.save({"state_dict": {"w": torch.arange(4.0)}, "loops": {"step": 3}}, out / "a" / "checkpoints" / "last.ckpt")
    (out / "results.csv").write_text("method,value\nnone,1.0\n")
    return out


def one_bit(path):
    torch.save({"state_dict": {"w": torch.arange(4.0) + 2**-22}, "loops": {"step": 3}}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: one_bit(out / "a" / "checkpoints" / "last.ckpt"), "last.ckpt differs"),
        (lambda out: (out / "results.csv").write_text("method,value\nnone,1.1\n"), "results.csv differs"),
        (lambda out: (out / "a" / ".done.json.partial").touch(), "Files too many"),
        (lambda out: (out / "results.csv").unlink(), "missing"),
    ],
)
def test_what_differs_is_seen(tmp_path, change, message, monkeypatch):
    monkeypatch.setattr(comparing, "read_run", lambda out: type("Run", (), {"stages": ()}))
    ours, theirs = small_run(tmp_path / "ours"), small_run(tmp_path / "theirs")
    comparing.check_same(ours, theirs)
    change(ours)
    with pytest.raises(TortureError, match=message):
        comparing.check_same(ours, theirs)


@pytest.mark.parametrize("name", ["a/done.json", "a/checkpoints/last.ckpt", "results.csv"])
def test_half_a_file_is_seen(tmp_path, name):
    out = small_run(tmp_path)
    comparing.check_whole(out)
    path = out / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TortureError, match="half-written"):
        comparing.check_whole(out)
