"""Ends a fit that is told to stop (SIGTERM, Ctrl-C) after the step under way, with its state saved."""

import signal
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_longrope.stopping import StoppedError, restore, taken


class SaveOnStop(Callback):
    """Saves a fit that gets SIGTERM, as Slurm sends it, after the step under way, and ends with exit status 143.

    It saves where every ``ModelCheckpoint`` with ``save_last`` does, so ``ckpt_path: last`` and ``longrope run`` go on
    with the next step, and none is run twice. On several processes one signal stops all after the same step. Before the
    first step and after the last, in a search or an evaluation for instance, the handler that was there before counts:
    that of the commands of ``longrope``, which have this callback always, ends at once. In these Ctrl-C (SIGINT) does
    the same, with exit status 130; elsewhere it is left to Lightning.

    A validation is not waited for: it ends after the batch under way, or before the next callback that measures. One
    that had begun, or was due with the step that is saved, is run whole before anything else when the fit goes on; so
    is one that was due with the step of any other checkpoint, where Lightning would leave it out.
    """

    def __init__(self) -> None:
        self._asked = 0  # the signal that came
        self._training = self._owing = False
        self._outer: dict[int, Any] = {}
        self._trainer: Trainer | None = None
        self._validated = -1  # the batch after which the last validation ended
        self._together = 0.0  # batches of this validation that every rank has
        self._seen = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._asked, self._trainer = 0, trainer
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]  # after those that save at the same step
        # Lightning's own lets ranks meet in a collective from within a handler, wherever they are: that may hang.
        trainer._signal_connector._sigterm_notifier_fn = partial(_pass_on, trainer)  # type: ignore[method-assign]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validation_is_owed": self._trainer is not None and self._owes(self._trainer)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._owing = bool(state_dict["validation_is_owed"])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pay(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._training:
            self._training = True
            numbers = dict.fromkeys((signal.SIGTERM, *taken()))
            self._outer = {number: signal.getsignal(number) for number in numbers}
            _handle(dict.fromkeys(numbers, self._take_note))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate() and self._all_asked(trainer):
            trainer._logger_connector.update_train_step_metrics()  # what Lightning would do after this hook
            self._stop(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training:
            batches = torch.tensor(float(sum(trainer.num_val_batches)), device=trainer.strategy.root_device)
            least = -trainer.strategy.reduce(-batches, reduce_op="max")
            self._seen, self._together = 0, least.item() if least.isfinite() else 0.0
            self.decide(trainer)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seen += 1
        if self._seen <= self._together:
            self.decide(trainer)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = trainer.fit_loop.epoch_loop.total_batch_idx

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()
        if callable(outer := self._outer.get(self._asked)):  # it came with the last step
            outer(self._asked, None)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pay(trainer)  # no step was left to run

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def decide(self, trainer: Trainer) -> None:
        """Ends the validation of a fit that was told to stop, on all processes; all must call this."""
        if self._training and trainer.validating and self._all_asked(trainer):
            self._stop(trainer)

    def _all_asked(self, trainer: Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(bool(self._asked), all=False)

    def _stop(self, trainer: Trainer) -> NoReturn:
        number = self._asked or signal.SIGTERM  # another process was asked
        raise StoppedError(_save(trainer), together=True, first=trainer.is_global_zero, number=number)

    def _owes(self, trainer: Trainer) -> bool:
        """Whether a validation is due after the last batch, and has not ended."""
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        progress: Any = loop.batch_progress.total
        if trainer.state.fn != TrainerFn.FITTING or fetcher is None or not 0 < progress.ready == progress.processed:
            return False
        return self._validated != loop.total_batch_idx and loop._should_check_val_fx(fetcher)

    def _pay(self, trainer: Trainer) -> None:
        """Runs the validation that the checkpoint came too early for, as Lightning would have."""
        if not self._owing:
            return
        self._owing = False
        loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
        epochs: Any = trainer.fit_loop.epoch_progress.current
        ended, first = (epochs.processed, epochs.completed), connector._first_loop_iter
        epochs.processed = epochs.completed = epochs.ready - 1  # its epoch has not ended yet
        loop.restarting, trainer.validating = False, True
        with torch.no_grad():
            loop.run()
        trainer.training, connector._first_loop_iter = True, first
        epochs.processed, epochs.completed = ended

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        if self._trainer is not None:
            _pass_on(self._trainer, number)

    def _end(self) -> None:
        if self._training:
            self._training = False
            _handle(self._outer)


def stop_if_asked(trainer: Trainer) -> None:
    """``SaveOnStop.decide`` where the trainer has it; between parts of a validation."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveOnStop):
            callback.decide(trainer)


def _save(trainer: Trainer) -> str:
    """Saves a checkpoint wherever the last one is kept; says where."""
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint) and saver.save_last]
    for saver in savers:
        if saver._last_global_step_saved != trainer.global_step:
            _save_last(trainer, saver)
    if not savers:
        return f"Step {trainer.global_step} was not saved: no ModelCheckpoint has `save_last: true`."
    places = ", ".join(str(Path(saver.last_model_path)) for saver in savers)
    return f"Step {trainer.global_step} is saved in {places}: `longrope run` goes on from it, `fit` with --ckpt_path."


def _save_last(trainer: Trainer, saver: ModelCheckpoint) -> None:
    """Saves the state as it is now, also where the last checkpoint is to be a link to an earlier one."""
    keeps, saver.save_last = saver.save_last, True
    if trainer.is_global_zero and saver.last_model_path and Path(saver.last_model_path).is_symlink():
        Path(saver.last_model_path).unlink()  # else the checkpoint it leads to would be overwritten
    trainer.strategy.barrier()
    try:
        saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))
    finally:
        saver.save_last = keeps


def _pass_on(trainer: Trainer, number: int, frame: FrameType | None = None) -> None:
    """Lets the processes that Lightning has started know."""
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        trainer.strategy.launcher.kill(number)


def _handle(handlers: dict[int, Any]) -> None:
    """Sets the handlers of signals, where this thread can."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            restore(handler, number)
