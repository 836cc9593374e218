"""The operators of the search script that LongRoPE's authors released, restated as a peer for the benchmark.

Kept as they behave, faults included: a mutation sweeps over all pairs again and again, redrawing each with probability
p between its two neighbours, until the table is new; a crossover copies genes into the first parent and gives up after
some sweeps, and a mutant of that parent takes its place. One seed, no start tokens, no pinned pairs.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_longrope.search import Candidate, EvolutionSearch
from lightning_longrope.search.algorithm import Generations

SWEEPS = 10


class ReleasedSearch(EvolutionSearch):
    """Evolution with the released operators, started from YaRN's table alone."""

    def _generations(self) -> Generations:
        yield from self._evolve([self.space.seeds()[2]])

    @override
    def _mutant(self, parents: list[Candidate]) -> Candidate:
        return self._sweep(parents[self.rng.integers(len(parents))])

    @override
    def _child(self, parents: list[Candidate]) -> Candidate:
        first, second = sorted(self.rng.choice(len(parents), size=2, replace=False))
        mother, father = (np.array(parents[i].values) for i in (first, second))
        child = mother.copy()
        for _ in range(SWEEPS):
            for pair in np.flatnonzero(self.rng.random(len(child)) < self.probability):
                if self.rng.random() < 0.5:
                    child[pair] = father[pair]
                if (np.diff(child) >= 0).all() and (found := self._known(child, "crossover")) is not None:
                    return found
        return self._sweep(parents[first])

    def _sweep(self, parent: Candidate) -> Candidate:
        """Redraws pairs one after another, each between its neighbours as they are now, until the table is new."""
        values, low, step = np.array(parent.values), 1.0, self.space.step
        high = self.space.max_factor
        while True:
            for pair in np.flatnonzero(self.rng.random(len(values)) < self.probability):
                below = values[pair - 1] if pair else low
                above = values[pair + 1] if pair + 1 < len(values) else high
                steps = int(round((above - below) / step))
                if steps >= 0:
                    values[pair] = below + step * self.rng.integers(steps, endpoint=True)
            if (np.diff(values) >= 0).all() and (found := self._known(values, "mutant")) is not None:
                return found

    def _known(self, values: NDArray[Any], origin: str) -> Candidate | None:
        candidate = self.space.candidate(values, origin=origin)
        return None if candidate in self._scores else candidate
