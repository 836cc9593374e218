"""The default search: the best YaRN-like ramp first, then a small evolution that bends it.

In four numbers a ramp already holds most of what a search can win, so few evaluations find a good one; the
evolution then moves what a ramp cannot. It starts from YaRN, so under its own objective it never ends worse.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_longrope.search.algorithm import Generations, SearchAlgorithm
from lightning_longrope.search.evolution import check_counts, check_share, child, mutant
from lightning_longrope.search.operators import scale_block
from lightning_longrope.search.space import Candidate, SearchSpace

_RAMP_STEPS = 5  # ramps asked together while stepping: few, for each batch knows the one before


@dataclass(frozen=True)
class Ramp:
    """Factors that are 1 up to a pair, largest from another on, and change evenly in between.

        factor  1 1 1 1 . . ' ' 8 8 8
                      ^first  ^last

    Args:
        first: Last pair that keeps its speed; fractions allowed.
        last: First pair with the largest factor; above ``first``.
        largest: The largest factor.
        harmonic: Whether the speed (1 / factor) changes evenly, as in YaRN, or the logarithm of the factor.
    """

    first: float
    last: float
    largest: float
    harmonic: bool

    def values(self, pairs: int) -> NDArray[np.float64]:
        """Factors of all pairs, [F] float64."""
        blend = np.clip((np.arange(pairs) - self.first) / (self.last - self.first), 0, 1)
        return 1 / (1 - blend + blend / self.largest) if self.harmonic else self.largest**blend


class RampSearch(SearchAlgorithm):
    """Ramps, then evolution: good factors in about 100 evaluations.

    Args:
        max_evaluations: Budget when the run names none.
        ramp_share: Share of the budget spent on ramps: a third of them at random, the rest around the best.
        population: Number of best candidates that have offspring in the evolution.
        mutants: Mutants per generation.
        crossovers: Crossovers per generation.
        block_share: Share of the mutations that scale a block of neighbours; the rest redraw single genes.
        probability: Chance of each gene to be redrawn in such a rest.
    """

    def __init__(
        self,
        max_evaluations: int = 100,
        ramp_share: float = 0.4,
        population: int = 12,
        mutants: int = 8,
        crossovers: int = 8,
        block_share: float = 0.6,
        probability: float = 0.1,
    ) -> None:
        check_counts(max_evaluations=max_evaluations, population=population, offspring=mutants + crossovers)
        check_counts(least=0, mutants=mutants, crossovers=crossovers)
        check_share(ramp_share=ramp_share, block_share=block_share, probability=probability)
        self.max_evaluations = max_evaluations
        self.ramp_share = ramp_share
        self.population = population
        self.mutants = mutants
        self.crossovers = crossovers
        self.block_share = block_share
        self.probability = probability

    @property
    @override
    def kept(self) -> int:
        return self.population

    def _generations(self) -> Generations:
        assert self.limit is not None
        yield from self._ramps(round(self.ramp_share * self.limit))
        while True:
            parents = self.ranked()[: self.population]
            offspring = self._new(self.mutants, partial(self._mutant, parents))
            yield self._new(self.crossovers, partial(child, self, parents), offspring)

    def _ramps(self, budget: int) -> Generations:
        """Spends ``budget`` evaluations on ramps: seeds and random ones, then steps from the best, ever smaller."""
        tried: dict[Candidate, Ramp] = {}

        def propose(make: Callable[[], Ramp]) -> Candidate:
            ramp = make()
            candidate = self.space.candidate(ramp.values(self.space.pairs), origin="ramp")
            tried[candidate] = ramp
            return candidate

        # YaRN first, should the budget end here. As a ramp it is the same candidate, and one to step from.
        seeds = list(dict.fromkeys([*reversed(self.space.seeds()), propose(partial(yarn_ramp, self.space))]))
        yield self._new(budget // 3 - len(seeds), partial(propose, self._random_ramp), seeds)
        while self.evaluations < budget:
            best = tried[next(candidate for candidate in self.ranked() if candidate in tried)]
            step = 0.15 * 0.1 ** (self.evaluations / budget)
            count = min(_RAMP_STEPS, budget - self.evaluations)
            batch = self._new(count, partial(propose, partial(self._step, best, step)))
            if not batch:
                return
            yield batch

    def _random_ramp(self) -> Ramp:
        first = self.rng.uniform(0, 0.7 * self.space.pairs)
        last = self.rng.uniform(first + 1, max(self.space.pairs, first + 2))
        largest = math.exp(self.rng.uniform(*np.log(largest_range(self.space))))
        return Ramp(first, last, largest, bool(self.rng.random() < 0.5))

    def _step(self, ramp: Ramp, size: float) -> Ramp:
        """A ramp near by: its ends moved by about ``size`` of all pairs, its largest factor by about ``size`` of it."""
        first, last = np.array([ramp.first, ramp.last]) + size * self.space.pairs * self.rng.standard_normal(2)
        first = min(max(first, -1.0), self.space.pairs - 2.0)
        low, high = largest_range(self.space)
        largest = min(max(ramp.largest * math.exp(size * self.rng.standard_normal()), low), high)
        return Ramp(first, max(last, first + 1), largest, ramp.harmonic ^ bool(self.rng.random() < 0.2))

    def _mutant(self, parents: list[Candidate]) -> Candidate:
        parent = parents[int(len(parents) * self.rng.random() ** 2)]  # the better, the more often
        if self.rng.random() >= self.block_share:
            return mutant(self, parent, self.probability)
        start = int(self.rng.integers(self.space.pinned, self.space.pairs))
        stop = start + int(self.rng.integers(1, max(self.space.pairs // 3, 1), endpoint=True))
        factor = math.exp(0.15 * self.rng.standard_normal())
        values = scale_block(np.array(parent.values), start, stop, factor, monotone=self.space.monotone)
        return self.space.candidate(values, parent.start_tokens, "block")


def largest_range(space: SearchSpace) -> tuple[float, float]:
    """Half to 1.25 times the extension ratio, within the space."""
    low, high = (1 + space.step * gene for gene in space.gene_bounds)
    return min(max(0.5 * space.scale, low), high), min(max(1.25 * space.scale, low), high)


def yarn_ramp(space: SearchSpace) -> Ramp:
    """The ramp that is YaRN: harmonic, from the pair with 32 turns over the original length to that with one."""

    def pair(turns: float) -> float:
        wavelength = space.original_length / (turns * 2 * math.pi)
        return space.pairs * math.log(wavelength) / math.log(space.base)

    first = max(math.floor(pair(32)), 0)
    last = min(math.ceil(pair(1)), space.rotary_size - 1)
    return Ramp(first, max(last, first + 0.001), space.scale, harmonic=True)
