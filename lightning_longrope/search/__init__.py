"""Search algorithms for rescale factors: pure, with no models, no ranks, and no files but the journal."""

from lightning_longrope.search.algorithm import SearchAlgorithm, SearchResult
from lightning_longrope.search.critical import LongRoPE2Search
from lightning_longrope.search.evolution import EvolutionSearch
from lightning_longrope.search.journal import Journal, read_journal
from lightning_longrope.search.ramp import RampSearch
from lightning_longrope.search.recovery import RecoverySearch
from lightning_longrope.search.smooth import SmoothSearch
from lightning_longrope.search.space import Candidate, SearchSpace

__all__ = [
    "Candidate",
    "EvolutionSearch",
    "Journal",
    "LongRoPE2Search",
    "RampSearch",
    "RecoverySearch",
    "SearchAlgorithm",
    "SearchResult",
    "SearchSpace",
    "SmoothSearch",
    "read_journal",
]
