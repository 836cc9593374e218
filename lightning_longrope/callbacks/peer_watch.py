"""Notices that a process of the run is lost, and says which."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from typing_extensions import override

from lightning_longrope import peers


class PeerWatch(Callback):
    """Ends a run on several processes with one line that names the lost one, where a collective would hang or be dark.

    A process that is killed is noticed at once, one on a frozen or unplugged node after the timeout. Each node says it
    once. The commands of ``longrope`` have it always; give ``--peers.timeout`` there.

    Args:
        timeout: Seconds within which all end after one has fallen silent; a shorter timeout of the strategy counts
            instead.

    Raises:
        ValueError: If the timeout is not positive.
    """

    def __init__(self, timeout: float = peers.TIMEOUT) -> None:
        if not timeout > 0:
            raise ValueError(f"`timeout` must be a positive number of seconds, got {timeout}.")
        self.timeout = timeout

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.world_size > 1 and environment is not None:
            collectives = getattr(trainer.strategy, "_timeout", None)
            peers.connect(environment, min(self.timeout, collectives.total_seconds() if collectives else self.timeout))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):  # ends its workers without their atexit
            peers.leave()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        peers.explain(exception)
