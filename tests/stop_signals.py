"""A callback that sends a signal to its own process at a step or a validation batch, so that no test has to time it."""

import os
import signal

from lightning.pytorch import Callback


class SignalAt(Callback):
    """Sends a signal after ``step`` optimizer steps, on some ranks: in the next step, or in a validation batch."""

    def __init__(
        self, step: int, ranks: list[int] | None = None, batch: int | None = None, number: int = int(signal.SIGTERM)
    ) -> None:
        self.step, self.ranks, self.batch, self.number = step, ranks or [0], batch, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._send(trainer, None)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._send(trainer, batch_idx)

    def _send(self, trainer, batch):
        if trainer.global_step == self.step and batch == self.batch and trainer.global_rank in self.ranks:
            os.kill(os.getpid(), self.number)
