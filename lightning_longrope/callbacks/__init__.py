"""Callbacks of a `lightning.pytorch.Trainer`: the factor search and the evaluations."""

from lightning_longrope.callbacks.document_question import DocumentQuestion
from lightning_longrope.callbacks.factor_search import FactorSearch
from lightning_longrope.callbacks.harness_tasks import HarnessTasks
from lightning_longrope.callbacks.key_value import KeyValueRetrieval
from lightning_longrope.callbacks.measurement import Measurement, MeasuringCallback
from lightning_longrope.callbacks.needle import NeedleRetrieval
from lightning_longrope.callbacks.passkey import PasskeyRetrieval
from lightning_longrope.callbacks.peer_watch import PeerWatch
from lightning_longrope.callbacks.perplexity import PerplexityByLength
from lightning_longrope.callbacks.prefix_perplexity import PrefixPerplexity
from lightning_longrope.callbacks.save_on_stop import SaveOnStop
from lightning_longrope.callbacks.sliding_perplexity import SlidingPerplexity
from lightning_longrope.callbacks.throughput import Throughput

__all__ = [
    "DocumentQuestion",
    "FactorSearch",
    "HarnessTasks",
    "KeyValueRetrieval",
    "Measurement",
    "MeasuringCallback",
    "NeedleRetrieval",
    "PasskeyRetrieval",
    "PeerWatch",
    "PerplexityByLength",
    "PrefixPerplexity",
    "SaveOnStop",
    "SlidingPerplexity",
    "Throughput",
]
