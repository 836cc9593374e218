"""Callbacks of a `lightning.pytorch.Trainer`: the factor search and the evaluations."""

from lightning_longrope.callbacks.factor_search import FactorSearch
from lightning_longrope.callbacks.measurement import Measurement, MeasuringCallback
from lightning_longrope.callbacks.passkey import PasskeyRetrieval
from lightning_longrope.callbacks.perplexity import PerplexityByLength

__all__ = ["FactorSearch", "Measurement", "MeasuringCallback", "PasskeyRetrieval", "PerplexityByLength"]
