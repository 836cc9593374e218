"""How ranks agree on the files of a DeepSpeed checkpoint: nodes with disks of their own, a first rank that fails."""

import os
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from processes import run_ranks

import lightning_longrope.strategies.deepspeed as room
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
