"""What every evaluation callback shares: when it runs, on which rank, and that it leaves no trace.

A callback measures at the end of each validation (and test) run, before `ModelCheckpoint` looks, and logs the means
as ``{metric}/{length}``. Measuring runs in eval mode, without gradients, in the precision of the validation steps
(callback hooks run outside of it), and restores every random state, so a training run is bit for bit the same with
and without it. Every rank runs the same number of forward passes and gets the same results.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lightning_longrope import tracking
from lightning_longrope.metrics import Measurement

__all__ = ["Measurement", "MeasuringCallback"]

T = TypeVar("T")


class MeasuringCallback(Callback, ABC):
    """Base of callbacks that measure a model at several lengths. Subclasses write ``prepare`` and ``measure_length``.

    Args:
        lengths: Lengths to measure at, in tokens; None is the ``seq_len`` of the datamodule.
        split: Split of the datamodule to take text from.
        batch_tokens: Tokens of a forward pass; a longer row goes alone.
        seed: Chooses documents, keys and resamples.

    Attributes:
        results: What the last run measured, means and single depths.

    Raises:
        ValueError: If a length or ``batch_tokens`` is out of range.
    """

    def __init__(
        self,
        lengths: Sequence[int] | None = None,
        split: str = "validation",
        batch_tokens: int = 16384,
        seed: int = 0,
    ) -> None:
        if lengths is not None and (not lengths or min(lengths) < 2):
            raise ValueError(f"`lengths` needs at least one length of 2 or more tokens, got {lengths}.")
        if batch_tokens < 1:
            raise ValueError(f"`batch_tokens` must be at least 1, got {batch_tokens}.")
        self.lengths = None if lengths is None else tuple(lengths)
        self.split = split
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.results: list[Measurement] = []
        self._datamodule: Any = None
        self._resolved: tuple[int, ...] = ()

    @abstractmethod
    def prepare(self, datamodule: Any, lengths: Sequence[int]) -> None:
        """Take from the datamodule what ``measure_length`` needs, and fail now for lengths that cannot be measured."""

    @abstractmethod
    def measure_length(self, trainer: Trainer, module: LightningModule, length: int) -> list[Measurement]:
        """Measure ``module.model`` at one length. Called in eval mode, without gradients, in the right precision."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._connect(trainer)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._measure_and_log(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure_and_log(trainer, pl_module)

    def measure(
        self, trainer: Trainer, module: LightningModule, install: Callable[[int], None] | None = None
    ) -> list[Measurement]:
        """Measure at every length, on all ranks together.

        Args:
            trainer: Its ranks share the work; its datamodule gives the text.
            module: Has the model in ``model``.
            install: Called before each length is measured, with that length, to change the factors of the model.

        Returns:
            The measurements, the same on every rank; also kept in ``results``.
        """
        if self._datamodule is None or self._datamodule is not getattr(trainer, "datamodule", None):
            self._connect(trainer)
        results = []
        for length in self._resolved:
            if install is not None:
                install(length)
            with _no_trace(trainer, module):
                results += self.measure_length(trainer, module, length)
        self.results = results
        return results

    def _measure_and_log(self, trainer: Trainer, module: LightningModule) -> None:
        for found in self.measure(trainer, module):
            if found.depth is None:
                # Every rank has the same value; its mean is the value, and Lightning asks for the mean.
                module.log(f"{found.metric}/{found.length}", found.value, sync_dist=True)
        tracking.log_results(trainer, type(self).__name__, tracking.as_results(self.results))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tracking.log_final_results(trainer, type(self).__name__, tracking.as_results(self.results))

    def _connect(self, trainer: Trainer) -> None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        if datamodule is None:
            raise ValueError(
                f"{type(self).__name__} takes its text and tokenizer from a datamodule, and the trainer has none:"
                " pass `datamodule=` (on the command line `--data`)."
            )
        self._resolved = self.lengths or (datamodule.seq_len,)
        self.prepare(datamodule, self._resolved)
        self._datamodule = datamodule

    def rows(self, length: int) -> int:
        """Rows of ``length`` tokens that go in one forward pass."""
        return max(1, self.batch_tokens // length)

    def share(self, trainer: Trainer, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This rank's share of the forward passes, as many as every other rank's (ZeRO and FSDP gather in them).

        Args:
            trainer: Knows the rank and the number of ranks.
            items: All passes, the same on every rank.

        Yields:
            A pass, and whether its result counts: a rank that has none left repeats the last one.
        """
        for start in range(0, len(items), trainer.world_size):
            index = start + trainer.global_rank
            yield items[min(index, len(items) - 1)], index < len(items)

    def sum_over_ranks(self, trainer: Trainer, values: Tensor) -> Tensor:
        """Sum of a float64 tensor over all ranks, on the CPU; exact where only one rank has a nonzero entry."""
        if trainer.world_size == 1:
            return values
        return trainer.strategy.reduce(values.to(trainer.strategy.root_device), reduce_op="sum").cpu()


@contextmanager
def _no_trace(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Eval mode, no gradients, the precision of validation steps; every mode and random state as before at the end."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), isolate_rng(), trainer.precision_plugin.val_step_context():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
