"""How ranks agree on the files of a DeepSpeed checkpoint: nodes with disks of their own, a first rank that fails."""

import os
import shutil
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from processes import run_ranks

import lightning_longrope.strategies.deepspeed as room
from lightning_longrope.checkpoints import replaced_by
from lightning_longrope.strategies import LongContextDeepSpeedStrategy

pytestmark = pytest.mark.distributed


class EachItsNode(LongContextDeepSpeedStrategy):
    """Every rank is a node of its own."""

    num_nodes, local_rank, root_device = 2, 0, torch.device("cpu")
    node_rank = property(lambda self: torch.distributed.get_rank())
    is_global_zero = property(lambda self: torch.distributed.get_rank() == 0)


def write_shards(strategy, checkpoint, path, options=None):
    """As DeepSpeed does: every rank a shard, the first one the name of the tag too."""
    (path / "checkpoint").mkdir(parents=True, exist_ok=True)
    (path / "checkpoint" / f"shard{strategy.node_rank}").write_text(checkpoint["step"])
    if strategy.is_global_zero:
        (path / "latest").write_text("checkpoint")


def save_and_fail(folder):
    torch.distributed.init_process_group("gloo")
    DeepSpeedStrategy.save_checkpoint = write_shards
    strategy, rank = EachItsNode(), torch.distributed.get_rank()
    strategy.save_checkpoint({"step": "1"}, folder / "shared" / "last.ckpt")
    strategy.save_checkpoint({"step": "2"}, folder / "shared" / "last.ckpt")
    strategy.broadcast = lambda path, src=0: path  # the same path on each disk
    own = folder / f"disk{rank}"
    strategy.save_checkpoint({"step": "1"}, own / "last.ckpt")
    (own / "last.ckpt").rename(own / ".last.ckpt.replaced")  # killed between the renames
    strategy.save_checkpoint({"step": "2"}, own / "last.ckpt")
    del strategy.broadcast
    room.convert_to_universal = full_disk
    failure = strategy._convert(folder / "any", folder / "universal")
    assert failure == "OSError: No space left on device", failure
    room.convert_to_universal = lambda *_: os._exit(0) if rank == 0 else ""
    started = time.monotonic()
    with pytest.raises(RuntimeError):  # of gloo: rank 0 is gone
        strategy._convert(folder / "any", folder / "universal")
    assert time.monotonic() - started < 20


def full_disk(path: Path, folder: Path) -> str:
    time.sleep(2)
    raise OSError("No space left on device")


def test_files_of_two_nodes(tmp_path):
    run_ranks(2, save_and_fail, tmp_path, logs=tmp_path / "logs", timeout=60)
    for place, shards in (("shared", 2), ("disk0", 1), ("disk1", 1)):
        assert [path.name for path in (tmp_path / place).iterdir()] == ["last.ckpt"], place
        found = [path.read_text() for path in (tmp_path / place / "last.ckpt" / "checkpoint").iterdir()]
        assert found == ["2"] * shards, place


class AloneStrategy(LongContextDeepSpeedStrategy):
    """One process, without a process group."""

    num_nodes, node_rank, local_rank, is_global_zero = 1, 0, 0, True

    def broadcast(self, obj, src=0):
        return obj

    def barrier(self, name=None):
        pass

    def reduce_boolean_decision(self, decision, all=True):
        return decision


class KilledError(BaseException):
    """Stands in for SIGKILL: nobody catches it."""


def killed_at(number, monkeypatch):
    """Ends a process before so many renames and removals; a folder loses a file first. True if there were fewer."""
    left, rename, rmtree = iter(range(number)), Path.rename, shutil.rmtree

    def before(work, *arguments):
        if next(left, None) is not None:
            return work(*arguments)
        if work is rmtree:
            (arguments[0] / "latest").unlink(missing_ok=True)
        raise KilledError

    monkeypatch.setattr(Path, "rename", lambda path, target: before(rename, path, target))
    monkeypatch.setattr(shutil, "rmtree", lambda path: before(rmtree, path))
    return left


def whole_step(path):
    """The step of the one checkpoint there is: in its place, or beside it where ``put_back`` finds it."""
    place = path if path.exists() else replaced_by(path)
    assert (place / "latest").read_text() == "checkpoint"
    return int((place / "checkpoint" / "shard0").read_text())


def saved(strategy, step, path, kill, monkeypatch):
    """Saves and is killed; whether it was."""
    with monkeypatch.context() as patch:
        killed_at(kill, patch)
        try:
            strategy.save_checkpoint({"step": str(step)}, path)
        except KilledError:
            return True
    return False


def test_a_kill_at_any_rename_or_removal_of_a_save_and_of_the_next_leaves_one_whole_checkpoint(tmp_path, monkeypatch):
    """A save begins where a killed one has ended, without anything in between that would mend."""
    monkeypatch.setattr(DeepSpeedStrategy, "save_checkpoint", write_shards)
    strategy, kills = AloneStrategy(), 0
    for first in count():
        for second in count():
            path = tmp_path / f"{first}-{second}" / "last.ckpt"
            strategy.save_checkpoint({"step": "1"}, path)
            one = saved(strategy, 2, path, first, monkeypatch)
            assert whole_step(path) in ((1, 2) if one else (2,))
            before = whole_step(path)
            other = saved(strategy, 3, path, second, monkeypatch)
            assert whole_step(path) in ((before, 3) if other else (3,)), (first, second)
            kills += one + other
            strategy.save_checkpoint({"step": "4"}, path)
            assert whole_step(path) == 4
            assert [found.name for found in path.parent.iterdir()] == ["last.ckpt"]
            if not other:
                break
        if not one:
            break
    assert kills > 15


@pytest.mark.parametrize("name", ["reduce_bucket_size", "allgather_bucket_size"])
def test_sizes_in_zero_are_taken_though_lightning_has_the_same(name):
    class Model(torch.nn.Module):
        config = type("Config", (), {"get_text_config": lambda self: self, "hidden_size": 4096})()

    module = torch.nn.Module()
    module.model = Model()
    strategy = LongContextDeepSpeedStrategy(zero={name: 200_000_000})
    strategy._size_buckets(module)
    zero = strategy.config["zero_optimization"]
    assert sorted(zero[key] for key in ("reduce_bucket_size", "allgather_bucket_size")) == [4096**2, 200_000_000]
    assert zero[name] == 200_000_000


def test_a_configuration_stays_as_it_was_given():
    given = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    strategy = LongContextDeepSpeedStrategy(config=given, zero={"round_robin_gradients": True})
    strategy.config["zero_optimization"]["offload_optimizer"]["device"] = "none"
    assert given == {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
