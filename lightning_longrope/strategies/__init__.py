"""Strategies for long contexts: Lightning's own, with what they lack."""

from lightning_longrope.strategies.ddp import LongContextDDPStrategy
from lightning_longrope.strategies.deepspeed import LongContextDeepSpeedStrategy
from lightning_longrope.strategies.fsdp2 import LongContextFSDP2Strategy
from lightning_longrope.strategies.sequence_parallel import SequenceParallel

__all__ = ["LongContextDDPStrategy", "LongContextDeepSpeedStrategy", "LongContextFSDP2Strategy", "SequenceParallel"]
