"""Plain data parallelism, with sequence parallelism."""

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from lightning_longrope.strategies.sequence_parallel import SequenceParallel


class LongContextDDPStrategy(SequenceParallel, DDPStrategy):
    """Lightning's ``DDPStrategy`` with sequence parallelism: every rank has the whole model.

    Args:
        sequence_parallel_size: Ranks that share the tokens of a row.
        timeout: After so long without an answer of the other ranks a run ends.
        **kwargs: Those of Lightning's ``DDPStrategy``.
    """

    def __init__(
        self, sequence_parallel_size: int = 1, timeout: timedelta = timedelta(minutes=10), **kwargs: Any
    ) -> None:
        super().__init__(sequence_parallel_size=sequence_parallel_size, timeout=timeout, **kwargs)
