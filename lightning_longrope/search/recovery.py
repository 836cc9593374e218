"""The search for a table of short texts: between the pretrained rotary embedding and the one the model was tuned with.

Tuning moves a model away from its pretrained angles, so on short texts neither those nor the table of the long window
is best, but something in between; and less of the attention factor, which was made for long rows.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_longrope.search.algorithm import Generations, SearchAlgorithm
from lightning_longrope.search.evolution import check_counts
from lightning_longrope.search.space import Candidate


class RecoverySearch(SearchAlgorithm):
    """CMA-ES over two shares, from 0 to 1, of what short texts keep of the factors installed on a model.

    Factors are ``installed ** t``; where the space allows several attention factors, theirs is the one nearest to
    ``1 + a (installed - 1)``. Both ends are asked first, so under its own objective the search never ends worse than
    the better of them.

    Args:
        max_evaluations: Budget when the run names none.
        generation: Candidates asked for together.
    """

    def __init__(self, max_evaluations: int = 24, generation: int = 5) -> None:
        check_counts(max_evaluations=max_evaluations)
        check_counts(least=3, generation=generation)
        self.max_evaluations = max_evaluations
        self.generation_size = generation

    @property
    @override
    def searches_start_tokens(self) -> bool:
        return False

    def _generations(self) -> Generations:
        if self.space.warm_start is None:
            raise ValueError("RecoverySearch needs a model with factors installed: it searches between them and none.")
        yield [self._between(np.array(shares)) for shares in ((0.0, 0.0), (1.0, 1.0), (1.0, 0.0))]
        while True:
            optimizer = self._optimizer()
            while not optimizer.stop():
                points = optimizer.ask()
                scores = yield [self._between(point) for point in points]
                optimizer.tell(points, scores)

    def _optimizer(self) -> Any:
        import cma  # half a second that other searches need not pay

        # Own randomness, and no seed: by default cma seeds and draws from numpy's global generator.
        options = {"popsize": self.generation_size, "bounds": [0, 1], "verbose": -9, "seed": math.nan}
        return cma.CMAEvolutionStrategy([0.8, 0.4], 0.3, {**options, "randn": self._normal})

    def _normal(self, *shape: int) -> NDArray[np.float64]:
        return self.rng.standard_normal(shape)

    def _between(self, shares: NDArray[np.float64]) -> Candidate:
        assert self.space.warm_start is not None
        installed, (factors, attention) = self.space.warm_start, shares.tolist()
        wanted = 1 + attention * (installed.attention_factor - 1)
        nearest = min(self.space.attention_factors, key=lambda factor: abs(factor - wanted))
        candidate = self.space.candidate(np.array(installed.values) ** factors, origin="between")
        return replace(candidate, attention_factor=nearest)
