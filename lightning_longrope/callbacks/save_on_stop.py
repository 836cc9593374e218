"""Ends a fit that is told to stop (SIGTERM) after the step under way, with its state saved."""

import signal
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from typing_extensions import override

from lightning_longrope.stopping import StoppedError, restore


class SaveOnStop(Callback):
    """Saves a fit that gets SIGTERM, as Slurm sends it, after the step under way, and ends with exit status 143.

    It saves where every ``ModelCheckpoint`` with ``save_last`` does, so ``ckpt_path: last`` and ``longrope run`` go on
    with the next step, and none is run twice. On several processes one signal stops all after the same step. Before the
    first step and after the last, in a search or an evaluation for instance, the handler that was there before counts:
    that of the commands of ``longrope``, which have this callback always, ends at once.
    """

    def __init__(self) -> None:
        self._asked = self._training = False
        self._outer: Any = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._asked = False
        # Lightning's own lets ranks meet in a collective from within a handler, wherever they are: that may hang.
        trainer._signal_connector._sigterm_notifier_fn = partial(_pass_on, trainer)  # type: ignore[method-assign]

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._training:
            self._training, self._trainer = True, trainer
            self._outer = signal.getsignal(signal.SIGTERM)
            _handle(self._take_note)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            raise StoppedError(_save(trainer), together=True, first=trainer.is_global_zero)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()
        if self._asked and callable(self._outer):  # it came with the last step
            self._outer(signal.SIGTERM, None)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        _pass_on(self._trainer, number)

    def _end(self) -> None:
        if self._training:
            self._training = False
            _handle(self._outer)


def _save(trainer: Trainer) -> str:
    """Saves a checkpoint wherever the last one is kept; says where."""
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint) and saver.save_last]
    for saver in savers:
        if saver._last_global_step_saved != trainer.global_step:
            saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))
    if not savers:
        return f"Step {trainer.global_step} was not saved: no ModelCheckpoint has `save_last: true`."
    places = ", ".join(str(Path(saver.last_model_path)) for saver in savers)
    return f"Step {trainer.global_step} is saved in {places}: `longrope run` goes on from it, `fit` with --ckpt_path."


def _pass_on(trainer: Trainer, number: int, frame: FrameType | None = None) -> None:
    """Lets the processes that Lightning has started know."""
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        trainer.strategy.launcher.kill(number)


def _handle(handler: Any) -> None:
    """Sets the handler, where this thread can."""
    if threading.current_thread() is threading.main_thread():
        restore(handler)
