"""The judgement of a search: its winner and the baselines on documents that the search has not seen.

Shapes: D documents. Scores are in nats per token, lower is better.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class HeldOut:
    """Scores on held-out documents, with 95 % intervals of a bootstrap over documents.

    Attributes:
        score: Score of the winner.
        low: Lower end of its interval.
        high: Upper end of its interval.
        documents: Number of held-out documents.
        baselines: Score of each baseline on the same documents.
        best_baseline: Name of the best of them.
        difference: Score of the winner less that of the best baseline; negative where the winner is better.
        difference_low: Lower end of the interval of the difference, both scored on the same draws of documents.
        difference_high: Upper end of it.
    """

    score: float
    low: float
    high: float
    documents: int
    baselines: dict[str, float]
    best_baseline: str
    difference: float
    difference_low: float
    difference_high: float

    @property
    def within_noise(self) -> bool:
        """Whether the winner is not surely better than the best baseline."""
        return not self.difference_high < 0


def judge(
    winner: Sums,
    baselines: Mapping[str, Sums],
    value: Callable[[Sums], float],
    seed: int = 0,
    resamples: int = 1000,
) -> HeldOut:
    """Scores and paired bootstrap intervals.

    Args:
        winner: The sums of each document that a score is made of, [D, 4] float64.
        baselines: The same of each baseline.
        value: Score of documents from their joint sums, [4].
        seed: Of the resampling; touches no global random state.
        resamples: Number of times the documents are drawn with replacement.

    Raises:
        ValueError: If there are fewer than two documents, which say nothing about the spread.

    Source: Efron 1979, percentile bootstrap.
    """
    if len(winner) < 2:
        raise ValueError(f"A judgement needs at least 2 held-out documents, got {len(winner)}.")
    scores = {name: value(sums.sum(0)) for name, sums in baselines.items()}
    best = min(scores, key=lambda name: np.nan_to_num(scores[name], nan=np.inf))
    draws = np.random.default_rng(seed).integers(len(winner), size=(resamples, len(winner)))
    ours, theirs = (np.array([value(sums[draw].sum(0)) for draw in draws]) for sums in (winner, baselines[best]))
    score = value(winner.sum(0))
    return HeldOut(
        score,
        *_interval(ours),
        len(winner),
        scores,
        best,
        score - scores[best],
        *_interval(ours - theirs),
    )


def _interval(values: Sums) -> tuple[float, float]:
    # an observed value: inf stays inf
    low, high = np.quantile(values, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)
