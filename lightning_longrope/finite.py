"""A run whose numbers break stops at that step, says on which rank, and leaves the last good checkpoint as it is."""

import math
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from lightning_longrope.peers import DecidedError

SKIPPED_STEPS = 20
"""Steps in a row that fp16 may leave out: each halves the scale of the loss, which starts at 2 ** 16."""


class _Step(NamedTuple):
    number: int  # from 1
    norm: "_Later"
    losses: list[Tensor]  # of this rank


class StopAtNan(Callback):
    """Ends training where gradients are not finite, on all ranks together, before anything of it can be saved.

    A loss that is nan or inf on one rank makes the gradients of all ranks so once they are reduced: their norm is what
    is looked at, once a step. The losses of the ranks are compared only where it is not finite. With fp16 the scaler of
    the loss leaves such steps out, which is no failure unless it does so ``SKIPPED_STEPS`` times in a row.

    On a processor the weights stay what they were before the step. On an accelerator the norm is read a step later, so
    that nobody waits for it here, and in any case before a checkpoint is written: what is broken then is in memory
    only.
    ``LongRoPEModule`` brings this callback with it.

    It does not stop a run whose loss grows and stays finite.

    Raises:
        ValueError: With the step, the ranks, the last checkpoint and what to try, in one line.
    """

    def __init__(self) -> None:
        self._begin()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._begin()

    def _begin(self) -> None:
        self._losses: list[Tensor] = []
        self._unread: _Step | None = None
        self._skipped = 0
        self._failure: ValueError | None = None

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not _skips_by_itself(trainer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._look_at(trainer, trainer.global_step + 1, get_total_norm(gradients))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        engine = _engine(trainer)
        if _skips_by_itself(trainer) and engine.micro_steps % engine.gradient_accumulation_steps() == 0:
            norm = math.nan if engine.optimizer.overflow else engine.get_global_grad_norm()
            self._look_at(trainer, trainer.global_step, torch.as_tensor(0.0 if norm is None else norm))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.read(trainer)

    def _look_at(self, trainer: Trainer, number: int, norm: Tensor) -> None:
        self.read(trainer)
        self._unread, self._losses = _Step(number, _Later(norm), self._losses), []
        if reads_at_once(norm):
            self.read(trainer)

    def read(self, trainer: Trainer) -> None:
        """Raises if the step looked at last is not finite; every rank calls it at the same places."""
        if self._failure is not None:
            raise self._failure
        step, self._unread = self._unread, None
        if step is None:
            return
        if 0 <= float(step.norm) < math.inf:  # DeepSpeed writes -1 for nan and inf
            self._skipped = 0
            return
        losses = trainer.strategy.all_gather(torch.stack(step.losses).sum()).flatten().tolist()
        self._skipped += 1
        scaled = _scales_losses(trainer) and all(map(math.isfinite, losses))
        if not scaled or self._skipped == SKIPPED_STEPS:
            self._failure = _failure(trainer, step.number, losses, self._skipped if scaled else 0)
            raise self._failure


def read_numbers(trainer: Trainer) -> None:
    """Has the numbers of a trainer's last step read, before its weights are saved."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StopAtNan):
            callback.read(trainer)


def reads_at_once(number: Tensor) -> bool:
    """Whether a number is there when the call that computes it returns."""
    return number.device.type == "cpu"


class _Later:
    """A number on its way to the processor, for which nobody waits before it is read."""

    def __init__(self, number: Tensor) -> None:
        number = number.full_tensor() if hasattr(number, "full_tensor") else number
        self._number, self._arrived = number, None
        if number.is_cuda:
            self._number = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def __float__(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._number)


def _engine(trainer: Trainer) -> Any:
    """DeepSpeed's engine, where it is at work."""
    return getattr(trainer.strategy, "deepspeed_engine", None)


def _skips_by_itself(trainer: Trainer) -> bool:
    """Whether gradients are out of sight, and the optimizer leaves out steps that are not finite (ZeRO)."""
    return hasattr(getattr(_engine(trainer), "optimizer", None), "overflow")


def _scales_losses(trainer: Trainer) -> bool:
    """Whether losses are scaled, and steps left out until the scale is right (fp16)."""
    engine = _engine(trainer)
    return getattr(trainer.precision_plugin, "scaler", None) is not None or bool(engine and engine.fp16_enabled())


def _failure(trainer: Trainer, step: int, losses: list[float], skipped: int) -> ValueError:
    """The error of a step; on other ranks than the first it is one that is not said again."""
    broken = {rank: loss for rank, loss in enumerate(losses) if not math.isfinite(loss)}
    where = f"rank{'s' * (len(broken) > 1)} {', '.join(map(str, broken))}" if broken else "all ranks"
    what = f"the loss is {' and '.join(sorted({str(loss) for loss in broken.values()}))}"
    if not broken:
        what = "the gradients are not finite, though the losses are"
    if skipped:
        what += f", for the {skipped}th step in a row"
    saved = _last_checkpoint(trainer)
    message = (
        f"step {step}, {where}: {what}. Training has stopped, and none of it was"
        f" saved: {f'the last good checkpoint is {saved}' if saved else 'there is no checkpoint yet'}."
        f" Try {_remedies(trainer)}."
    )
    return (ValueError if trainer.is_global_zero else DecidedError)(message)


def _last_checkpoint(trainer: Trainer) -> str:
    names = ("last_model_path", "best_model_path")  # of ModelCheckpoint; others may not say where they save
    paths = [getattr(one, name, "") for one in trainer.checkpoint_callbacks for name in names]
    return next(filter(None, [*paths, trainer.ckpt_path]), "")


def _remedies(trainer: Trainer) -> str:
    remedies = ["a lower learning rate or a longer warm-up of it"]
    if not trainer.gradient_clip_val:
        remedies.insert(0, "--trainer.gradient_clip_val 1")
    if str(trainer.precision).startswith("16"):
        remedies.insert(0, "--trainer.precision bf16-mixed")
    return ", ".join(remedies[:-1]) + (" or " if remedies[:-1] else "") + remedies[-1]
