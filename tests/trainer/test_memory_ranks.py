"""Savings of memory under every strategy, in real processes: the same losses as without any."""

import json
import os

import pytest
import torch
from helpers import LLAMA, random_loader
from lightning.pytorch import Trainer
from processes import PARTITIONED, run_ranks

from lightning_longrope import LongRoPEModule
from lightning_longrope.memory import Memory
from lightning_longrope.optimizers import Schedule
from lightning_longrope.strategies import (
    LongContextDDPStrategy,
    LongContextDeepSpeedStrategy,
    LongContextFSDP2Strategy,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STRATEGIES = {
    "ddp": lambda: LongContextDDPStrategy(),
    "shared rows": lambda: LongContextDDPStrategy(sequence_parallel_size=2),
    "fsdp2": lambda: LongContextFSDP2Strategy(),
    "zero2": lambda: LongContextDeepSpeedStrategy(stage=2),
    "zero3": lambda: LongContextDeepSpeedStrategy(stage=3, zero=PARTITIONED),
}


class Module(LongRoPEModule):
    def configure_model(self):
        torch.manual_seed(0)
        super().configure_model()

    def on_train_start(self):
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean").item())
        return loss


def train(folder, note, strategy, **savings):
    module = Module(
        config=LLAMA,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5),
        schedule=Schedule("constant", 0),
        **savings,
    )
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy(), max_steps=3, accumulate_grad_batches=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, random_loader(rows=16, length=48, batch_size=1))
    (folder / f"{note}{os.environ['RANK']}.json").write_text(json.dumps(module.losses))


def on_two_ranks(folder):
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "compiled")
    train(folder, "plain", STRATEGIES["ddp"])
    train(folder, "plain shared rows", STRATEGIES["shared rows"])
    for name, strategy in STRATEGIES.items():
        memory = Memory(offload_activations=True, mlp_tile=10)
        train(folder, name, strategy, gradient_checkpointing=True, memory=memory)


def test_losses_are_those_of_plain_steps(tmp_path):
    run_ranks(2, on_two_ranks, tmp_path, logs=tmp_path / "logs", timeout=150)
    for name in STRATEGIES:
        for rank in (0, 1):
            plain = "plain shared rows" if name == "shared rows" else "plain"
            expected = json.loads((tmp_path / f"{plain}{rank}.json").read_text())
            assert len(set(expected)) == 6
            assert json.loads((tmp_path / f"{name}{rank}.json").read_text()) == pytest.approx(expected, rel=2e-6), name
