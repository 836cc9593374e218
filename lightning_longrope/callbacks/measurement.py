"""What every evaluation callback shares: when it runs, on which rank, and that it leaves no trace.

A callback measures at the end of each validation (and test) run, or every so many steps or epochs of training, before
`ModelCheckpoint` looks, and logs the means as ``{metric}/{length}``. Measuring runs in eval mode, without gradients, in
the precision of the validation steps (callback hooks run outside of it), and restores every random state, so a training
run is bit for bit the same with and without it. Every rank runs the same number of forward passes and gets the same
results.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lightning_longrope import tracking
from lightning_longrope.callbacks.save_on_stop import stop_if_asked
from lightning_longrope.callbacks.throughput import untimed
from lightning_longrope.callbacks.workers import TrainerWorkers
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.metrics import DocumentSums, Measurement, PositionMean
from lightning_longrope.model import evaluating, install_factors

__all__ = ["Measurement", "MeasuringCallback", "TableAt", "text_of", "untraced"]

T = TypeVar("T")

TableAt = Callable[[int], RescaleFactors]
"""The factors a method uses for a sequence of some length, in tokens."""

_TEXTS: WeakKeyDictionary[Any, dict[tuple[Any, ...], Tensor]] = WeakKeyDictionary()


def text_of(datamodule: Any, how: str, *arguments: Any) -> Tensor:
    """What ``datamodule.filler(...)`` or ``datamodule.excerpts(...)`` gives, read once for all callbacks."""
    known = _TEXTS.setdefault(datamodule, {})
    if (how, *arguments) not in known:
        known[how, *arguments] = getattr(datamodule, how)(*arguments)
    return known[how, *arguments]


class MeasuringCallback(Callback, ABC):
    """Base of callbacks that measure a model at several lengths. Subclasses write ``prepare`` and ``measure_length``.

    Measures at the end of every validation run. With ``every_n_steps`` or ``every_n_epochs``, a fit measures then
    instead, whether it validates or not; ``ModelCheckpoint`` finds the values where it saves at the same steps
    (``every_n_train_steps``) or epochs.

    Args:
        lengths: Lengths to measure at, in tokens, each once; None is the ``seq_len`` of the datamodule.
        split: Split of the datamodule to take text from.
        batch_tokens: Tokens of a forward pass; a longer row goes alone.
        seed: Chooses documents, keys and resamples.
        every_n_steps: Optimizer steps between two measurements of a fit; None leaves it to the validation runs.
        every_n_epochs: The same in epochs.

    Attributes:
        results: What the last run measured, means and single depths.
        sums: For each (metric, length) of the last run that is an exponential of a mean: its sums by document.
        positions: Mean nll by position in the window, where the last run measured it.

    Raises:
        ValueError: If a length, ``batch_tokens`` or an interval is out of range, or both intervals are given.
    """

    def __init__(
        self,
        lengths: Sequence[int] | None = None,
        split: str = "validation",
        batch_tokens: int = 16384,
        seed: int = 0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
    ) -> None:
        if lengths is not None and (not lengths or min(lengths) < 2):
            raise ValueError(f"`lengths` needs at least one length of 2 or more tokens, got {lengths}.")
        if batch_tokens < 1:
            raise ValueError(f"`batch_tokens` must be at least 1, got {batch_tokens}.")
        if every_n_steps is not None and every_n_epochs is not None:
            raise ValueError("Give `every_n_steps` or `every_n_epochs`, not both.")
        if min(every_n_steps or 1, every_n_epochs or 1) < 1 or 0 in (every_n_steps, every_n_epochs):
            raise ValueError(
                f"`every_n_steps` and `every_n_epochs` must be at least 1, got {every_n_steps} and {every_n_epochs}."
            )
        self.lengths = None if lengths is None else tuple(dict.fromkeys(lengths))
        self.split = split
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.results: list[Measurement] = []
        self.sums: dict[tuple[str, int], DocumentSums] = {}
        self.positions: list[PositionMean] = []
        self._measured_step = 0
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
        self.connect(trainer)

    def measure_lengths(self, trainer: Trainer, module: LightningModule, lengths: Sequence[int]) -> list[Measurement]:
        """Measure at lengths that use the same factors; a subclass may share forward passes between them."""
        return [found for length in lengths for found in self.measure_length(trainer, module, length)]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # The step stands still while gradients are accumulated.
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self._measured_step:
            self._measured_step = step
            self._measure_and_log(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure_and_log(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own_time = trainer.state.fn == TrainerFn.FITTING and (self.every_n_steps or self.every_n_epochs)
        if not trainer.sanity_checking and not own_time:
            stop_if_asked(trainer)
            self._measure_and_log(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure_and_log(trainer, pl_module)

    def measure(self, trainer: Trainer, module: LightningModule, table_at: TableAt | None = None) -> list[Measurement]:
        """Measure at every length, on all ranks together.

        Args:
            trainer: Its ranks share the work; its datamodule gives the text.
            module: Has the model in ``model``.
            table_at: The factors to install for each length; None leaves the model as it is.

        Returns:
            The measurements, the same on every rank; also kept in ``results``.
        """
        self.connect(trainer)
        self.sums, self.positions, results = {}, [], []
        for table, lengths in groupby(self._resolved, table_at or _as_it_is):
            if table is not None:
                install_factors(module.model, table)
            with untraced(trainer, module):
                results += self.measure_lengths(trainer, module, list(lengths))
        self.results = results
        return results

    def _measure_and_log(self, trainer: Trainer, module: LightningModule) -> None:
        with untimed(trainer):
            found = self.measure(trainer, module)
        means = {f"{one.metric}/{one.length}": one.value for one in found if one.depth is None}
        training = trainer.training
        for name, value in means.items():
            # Every rank has the same value; its mean is the value, and Lightning asks for the mean.
            module.log(name, value, sync_dist=True, logger=False if training else None)
        # Between steps Lightning would hold the values back until it logs next, which a run that ends may not live to
        # see, and log them with every step from then on.
        for logger in trainer.loggers if training and means else ():
            logger.log_metrics(means, step=trainer.global_step - 1)
            logger.save()  # before a checkpoint behind which nobody measures it again
        tracking.log_results(trainer, type(self).__name__, tracking.as_results(self.results))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tracking.log_final_results(trainer, type(self).__name__, tracking.as_results(self.results))

    def connect(self, trainer: Trainer) -> None:
        """Takes what measuring needs from the trainer's datamodule; does nothing if that was done.

        Raises:
            ValueError: If the trainer has no datamodule or its text cannot be measured on.
        """
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "tokenizer"):
            raise ValueError(
                f"{type(self).__name__} takes its text and tokenizer from a datamodule, and the trainer has none"
                " with a `tokenizer`: pass `datamodule=` (on the command line `--data`)."
            )
        if datamodule is self._datamodule:
            return
        self._resolved = self.lengths or (datamodule.seq_len,)
        self.prepare(datamodule, self._resolved)
        self._datamodule = datamodule

    def rows(self, length: int) -> int:
        """Rows of ``length`` tokens that go in one forward pass."""
        return max(1, self.batch_tokens // length)

    def share(self, trainer: Trainer, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This rank's share of the forward passes, as many as every other rank's (ZeRO and FSDP gather in them).

        The ranks of a sequence-parallel group run the same ones.

        Args:
            trainer: Knows the rank and the number of ranks.
            items: All passes, the same on every rank.

        Yields:
            A pass, and whether its result counts: a rank that has none left repeats the last one.
        """
        workers = TrainerWorkers(trainer)
        for start in range(0, len(items), workers.world_size):
            index = start + workers.rank
            yield items[min(index, len(items) - 1)], index < len(items)

    def sum_over_ranks(self, trainer: Trainer, values: Tensor) -> Tensor:
        """Sum of a float64 tensor over all ranks' shares, on the CPU; exact where only one has a nonzero entry."""
        return TrainerWorkers(trainer).sum(values)


def _as_it_is(length: int) -> None:
    """No table: the model keeps the factors it has."""


@contextmanager
def untraced(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Eval mode, no gradients, the precision of validation steps; every mode and random state as before at the end."""
    with evaluating(module), torch.no_grad(), isolate_rng(), trainer.precision_plugin.val_step_context():
        yield
