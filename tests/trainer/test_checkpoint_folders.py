"""A sharded checkpoint that a kill interrupts leaves the one before it, bit for bit, and no mix of both."""

import os
import signal
import time
from functools import partial

import pytest
import torch
from helpers import LLAMA, random_loader
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_ranks, start_ranks
from torch.distributed.checkpoint import FileSystemWriter

from lightning_longrope import LongRoPEModule
from lightning_longrope.checkpoints import read_checkpoint
from lightning_longrope.optimizers import Schedule
from lightning_longrope.strategies import LongContextFSDP2Strategy

pytestmark = pytest.mark.distributed
STEPS = 3


class KilledInItsShard(Callback):
    """Rank 1 is killed while it writes the second checkpoint, when the other has written its shard."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1 and trainer.global_rank == 1:
            FileSystemWriter.write_data = self._die

    @staticmethod
    def _die(*_):
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)


def fit(folder, *callbacks, steps=STEPS, ckpt_path=None):
    torch.manual_seed(0)
    module = LongRoPEModule(
        config=LLAMA, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5), schedule=Schedule("constant", 0)
    )
    saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)
    quiet = ("logger", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=LongContextFSDP2Strategy(), max_steps=steps, limit_val_batches=0,
        default_root_dir=folder, callbacks=[*callbacks, saver], **dict.fromkeys(quiet, False),
    )  # fmt: skip
    trainer.fit(module, random_loader(rows=16), ckpt_path=ckpt_path)


def weights(path):
    return read_checkpoint(path)[1]


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_kill_in_the_shard_of_one_rank_leaves_the_checkpoint_before_it(tmp_path):
    run_ranks(2, partial(fit, steps=1), tmp_path / "one", logs=tmp_path / "logs")
    cut, whole = tmp_path / "cut", weights(tmp_path / "one" / "last.ckpt")
    processes = start_ranks(2, fit, cut, KilledInItsShard(), logs=tmp_path / "cut-logs")
    processes[1].join(90)
    assert processes[1].exitcode == -signal.SIGKILL
    for process in processes:
        process.kill()
        process.join()
    assert (cut / ".last.ckpt.partial").is_dir()
    found = weights(cut / "last.ckpt")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], weight) for name, weight in whole.items())
    (cut / "last.ckpt").rename(cut / ".last.ckpt.replaced")  # and a kill between the renames
    run_ranks(2, partial(fit, ckpt_path=cut / "last.ckpt"), cut, logs=tmp_path / "again")
    assert {path.name for path in cut.iterdir()} == {"last.ckpt"}
    assert torch.load(cut / "last.ckpt" / "meta.pt", weights_only=True)["global_step"] == STEPS
