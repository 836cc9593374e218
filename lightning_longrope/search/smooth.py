"""A search over smooth curves: few knots, one covariance, many fewer evaluations than gene by gene.

Published factor tables are nearly smooth on a logarithmic scale, so a handful of knots describes them.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_longrope.search.algorithm import Generations, SearchAlgorithm
from lightning_longrope.search.evolution import check_counts
from lightning_longrope.search.ramp import SURVIVORS
from lightning_longrope.search.space import Candidate


class SmoothSearch(SearchAlgorithm):
    """CMA-ES over the logarithms of the factors at a few knots, joined by straight lines.

    Knots are evenly spaced over the free pairs, which is even spacing in the logarithm of their wavelength.
    Starts at the best of linear, NTK and YaRN. Does not search the start tokens: it takes the fewest allowed.

    Args:
        knots: Number of knots, the dimension of the search.
        spread: First standard deviation, as a share of the logarithmic range of the factors.
        max_evaluations: Budget when the run names none.
    """

    def __init__(self, knots: int = 8, spread: float = 0.1, max_evaluations: int = 100) -> None:
        check_counts(least=2, knots=knots)
        check_counts(max_evaluations=max_evaluations)
        if not 0 < spread <= 1:
            raise ValueError(f"`spread` must be above 0 and at most 1, got {spread}.")
        self.knots = knots
        self.spread = spread
        self.max_evaluations = max_evaluations

    @property
    @override
    def searches_start_tokens(self) -> bool:
        return False

    @property
    @override
    def survivors(self) -> list[Candidate]:
        return super().survivors[:SURVIVORS]

    def _generations(self) -> Generations:
        yield self.space.seeds()
        while True:
            optimizer = self._optimizer(self.best[0])
            while not optimizer.stop():
                points = optimizer.ask()
                scores = yield [self._curve(point) for point in points]
                optimizer.tell(points, scores)

    def _optimizer(self, start: Candidate) -> Any:
        import cma  # half a second that other searches need not pay

        low, high = self._range()
        places = np.arange(self.space.pinned, self.space.pairs)
        knots = np.interp(self._places(), places, np.log(start.values[self.space.pinned :]))
        # Own randomness, and no seed: by default cma seeds and draws from numpy's global generator.
        options = {"bounds": [low, high], "verbose": -9, "seed": math.nan, "randn": self._normal}
        return cma.CMAEvolutionStrategy(np.clip(knots, low, high), self.spread * (high - low), options)

    def _normal(self, *shape: int) -> NDArray[np.float64]:
        return self.rng.standard_normal(shape)

    def _range(self) -> tuple[float, float]:
        low, high = (1 + self.space.step * gene for gene in self.space.gene_bounds)
        return math.log(low), math.log(high) + 1e-9  # never an empty interval, which cma refuses

    def _places(self) -> NDArray[np.float64]:
        return np.linspace(self.space.pinned, self.space.pairs - 1, self.knots)

    def _curve(self, knots: NDArray[np.float64]) -> Candidate:
        values = np.exp(np.interp(np.arange(self.space.pairs), self._places(), knots))
        return self.space.candidate(values, origin="smooth")
