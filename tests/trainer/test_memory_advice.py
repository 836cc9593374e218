"""Runs that end out of memory, in a real Trainer and on the command line: the same error, which says what is next."""

import pytest
import torch
from helpers import LLAMA, random_loader
from known_models import Module, trainer_with
from lightning.pytorch import LightningModule

from lightning_longrope import LongRoPEModule
from lightning_longrope.__main__ import main
from lightning_longrope.advising import MemoryAdvice
from lightning_longrope.levers import Levers, advice
from lightning_longrope.memory import Memory


def too_much():
    """Asks for more memory than there is, which the allocator of the CPU refuses."""
    return torch.empty(1 << 50)


class TooMuch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient + too_much()[0]


class Greedy(LongRoPEModule):
    """Runs out of memory in the forward pass, the backward pass, the optimizer's step or validation."""

    where = "forward"

    def training_step(self, batch, batch_idx):
        if self.where == "forward":
            too_much()
        loss = super().training_step(batch, batch_idx)
        return TooMuch.apply(loss) if self.where == "backward" else loss

    def on_before_optimizer_step(self, optimizer):
        if self.where == "step":
            too_much()

    def validation_step(self, batch, batch_idx):
        if self.where == "validation":
            too_much()

    def on_fit_start(self):
        if self.where == "setup":
            too_much()


def fails(tmp_path, module, **options):
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        trainer_with(tmp_path, **options).fit(module, random_loader(), random_loader(rows=2))
    return getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize("where", ["forward", "backward", "step"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_next_saving_is_named_wherever_a_step_ends(tmp_path, where, accumulate):
    module = Greedy(config=LLAMA)
    module.where = where
    (note,) = fails(tmp_path, module, accumulate_grad_batches=accumulate)
    assert note.startswith(
        "Out of memory. Next: activation checkpointing, `model.init_args.gradient_checkpointing: true`"
    )


def test_what_is_in_use_is_not_named_again(tmp_path):
    module = Greedy(config=LLAMA, gradient_checkpointing=True)
    assert "`model.init_args.memory.offload_activations: true`" in fails(tmp_path, module)[0]
    module = Greedy(config=LLAMA, gradient_checkpointing=True, memory=Memory(offload_activations=True))
    assert "`model.init_args.memory.mlp_tile: 4096`" in fails(tmp_path, module)[0]
    module = Greedy(config=LLAMA, gradient_checkpointing=True, memory=Memory(offload_activations=True, mlp_tile=8))
    strategy = "lightning_longrope.strategies.LongContextDeepSpeedStrategy"
    assert f"{strategy}, init_args: {{stage: 3, offload_optimizer: true}}" in fails(tmp_path, module)[0]


def test_no_layer_input_is_to_blame_before_the_first_step_or_without_gradients(tmp_path):
    module = Greedy(config=LLAMA)
    module.where = "setup"
    assert "ZeRO stage 3" in fails(tmp_path, module)[0]
    module = Greedy(config=LLAMA)
    module.where = "validation"
    assert "tiled MLP" in fails(tmp_path, module)[0]


def test_other_errors_and_other_modules_are_left_alone(tmp_path):
    class Broken(LongRoPEModule):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match") as caught:
        trainer_with(tmp_path).fit(Broken(config=LLAMA), random_loader(), random_loader())
    assert not hasattr(caught.value, "__notes__")

    class Somebodys(Module):
        def training_step(self, batch, batch_idx):
            too_much()

    somebodys: LightningModule = Somebodys(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="can't allocate") as caught:
        trainer_with(tmp_path, MemoryAdvice()).fit(somebodys, random_loader(), random_loader())
    assert "chunked loss, `lightning_longrope.losses.chunked_nll as the loss`" in caught.value.__notes__[0]


def test_the_command_line_says_it_in_one_line(tmp_path, capsys, monkeypatch):
    words = ["fit", "--model", "test_memory_advice.Greedy", "--model.config", str(LLAMA).replace("'", "")]
    words += ["--data", "lightning_longrope.datamodules.SampleTextDataModule", "--data.seq_len", "32"]
    words += ["--data.vocab_size", "300", "--data.cache_dir", str(tmp_path / "data"), "--trainer.logger", "false"]
    words += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)]
    words += [
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.max_epochs",
        "1",
        "--trainer.num_sanity_val_steps",
        "0",
    ]
    words += ["--trainer.enable_checkpointing", "false", "--model.config.vocab_size", "300"]
    assert main(words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "longrope: error: Out of memory. Next: activation checkpointing, `model.init_args.gradient_ch"
    )
    assert "can't allocate memory" in last
    monkeypatch.setenv("LONGROPE_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        main(words)


def test_the_order_of_savings():
    levers, found = Levers("ddp", devices=4, heads=4, chunked_loss=False), []
    for changes in (
        {"chunked_loss": True},
        {"gradient_checkpointing": True}, {"offload_activations": True}, {"mlp_tile": 4096},
        {"sequence_parallel_size": 4}, {"strategy": "deepspeed", "zero_stage": 3},
        {"offload_optimizer": True}, {"offload_parameters": True}, {},
    ):  # fmt: skip
        found.append(advice(levers).split("Next: ")[1].split(",")[0])
        levers = Levers(**{**vars(levers), **changes})
    assert found == [
        "chunked loss",
        "activation checkpointing", "offload of layer inputs", "tiled MLP", "sequence parallel", "ZeRO stage 3",
        "offload of the optimizer", "offload of the weights", "more GPUs",
    ]  # fmt: skip
