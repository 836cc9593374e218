"""The default search: the best YaRN-like ramp, in three numbers, and then, on request, an evolution that bends it.

Three numbers hold most of what a search can win and can hardly be fitted to the documents of the search, so few
documents and few evaluations find them. The ramp's slow end stays at the extension ratio, and begins no later than at
the pair that turned ``LEAST_TURNS`` times in the pretrained window: slower pairs have seen too little of the circle.
A smaller factor would show the model angles it has not seen, for which the end of the window pays.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_longrope.search.algorithm import Generations, SearchAlgorithm
from lightning_longrope.search.evolution import check_counts, check_share, child, mutant
from lightning_longrope.search.operators import scale_block
from lightning_longrope.search.space import Candidate, SearchSpace

START = (10.0, 0.55, -1.4)
"""First and last pair, as turns in the pretrained window, and bend: the middle of what trained models chose."""

LEAST_TURNS = 0.6
"""Turns in the pretrained window below which a pair has the largest factor, unless it is pinned, in all ramps but
YaRN's and a warm start. START lies beyond it, so more than half of the first ramps end exactly there."""

SPREAD = (0.8, 0.5, 0.5)
"""First standard deviations of the logarithms of those turns and of the bend."""

SURVIVORS = 4
"""Candidates that a search which learns from generations, not from its best, scores again on more documents."""


@dataclass(frozen=True)
class Ramp:
    """Factors that are 1 up to a pair, largest from another on, and a power mean of both in between.

        factor  1 1 1 1 . . ' ' 8 8 8
                      ^first  ^last

    Args:
        first: Last pair that keeps its speed; fractions allowed.
        last: First pair with the largest factor; above ``first``.
        largest: The largest factor.
        bend: Exponent of the power mean: at -1 the speed (1 / factor) changes evenly, as in YaRN; at 0 the logarithm
            of the factor; below, the factors stay small for longer.
    """

    first: float
    last: float
    largest: float
    bend: float

    def values(self, pairs: int) -> NDArray[np.float64]:
        """Factors of all pairs, [F] float64."""
        blend = np.clip((np.arange(pairs) - self.first) / (self.last - self.first), 0, 1)
        if abs(self.bend) < 1e-6:
            return self.largest**blend
        return (1 - blend + blend * self.largest**self.bend) ** (1 / self.bend)


class RampSearch(SearchAlgorithm):
    """CMA-ES over the three numbers of a ramp, then evolution if the budget leaves room for it.

    Asks for YaRN's own ramp first, so it never ends worse than that with the attention factor of the space; YaRN as
    published has another one. Ramps take the fewest start tokens allowed: only the evolution searches them.

    Args:
        max_evaluations: Budget when the run names none.
        ramp_share: Share of the budget spent on ramps; the rest goes to the evolution.
        generation: Ramps asked for together.
        population: Number of best candidates that have offspring in the evolution.
        mutants: Mutants per generation.
        crossovers: Crossovers per generation.
        block_share: Share of the mutations that scale a block of neighbours; the rest redraw single genes.
        probability: Chance of each gene to be redrawn in such a rest.
    """

    def __init__(
        self,
        max_evaluations: int = 17,
        ramp_share: float = 1.0,
        generation: int = 7,
        population: int = 12,
        mutants: int = 8,
        crossovers: int = 8,
        block_share: float = 0.6,
        probability: float = 0.1,
    ) -> None:
        check_counts(max_evaluations=max_evaluations, population=population, offspring=mutants + crossovers)
        check_counts(least=0, mutants=mutants, crossovers=crossovers)
        check_counts(least=3, generation=generation)
        check_share(ramp_share=ramp_share, block_share=block_share, probability=probability)
        self.max_evaluations = max_evaluations
        self.ramp_share = ramp_share
        self.generation_size = generation
        self.population = population
        self.mutants = mutants
        self.crossovers = crossovers
        self.block_share = block_share
        self.probability = probability

    @property
    @override
    def searches_start_tokens(self) -> bool:
        return self.ramp_share < 1

    @property
    @override
    def kept(self) -> int:
        return self.population

    @property
    @override
    def survivors(self) -> list[Candidate]:
        # ramps are not made from earlier ones, an evolution is
        return super().survivors[: SURVIVORS if self.ramp_share == 1 else None]

    def _generations(self) -> Generations:
        assert self.limit is not None
        yield from self._ramps(round(self.ramp_share * self.limit))
        while True:
            parents = self.ranked()[: self.population]
            offspring = self._new(self.mutants, partial(self._mutant, parents))
            yield self._new(self.crossovers, partial(child, self, parents), offspring)

    def _ramps(self, budget: int) -> Generations:
        """Spends ``budget`` evaluations on ramps; the last is the middle of what the steps have come to."""
        yarn = self.space.candidate(yarn_ramp(self.space).values(self.space.pairs), origin="seed:yarn")
        warm = [seed for seed in self.space.seeds() if seed.origin == "seed:warm"]
        optimizer = self._optimizer(self._nearest(warm[0]) if warm else np.zeros(3))
        yield [yarn, *warm, self._ramp(optimizer.x0)]
        while self.evaluations < budget - 1 and not optimizer.stop():
            points = optimizer.ask()
            scores = yield [self._ramp(point) for point in points]
            optimizer.tell(points, scores)
        yield [self._ramp(optimizer.result.xfavorite)]

    def _optimizer(self, start: NDArray[np.float64]) -> Any:
        import cma  # half a second that other searches need not pay

        # Own randomness, and no seed: by default cma seeds and draws from numpy's global generator.
        options = {"popsize": self.generation_size, "verbose": -9, "seed": math.nan, "randn": self._normal}
        return cma.CMAEvolutionStrategy(start, 1.0, options)

    def _nearest(self, candidate: Candidate) -> NDArray[np.float64]:
        """The point whose ramp is nearest to a candidate, by the logarithms of the factors."""
        target, optimizer = np.log(candidate.values), self._optimizer(np.zeros(3))
        while not optimizer.stop():
            points = optimizer.ask()
            optimizer.tell(points, [float(np.square(np.log(self._ramp(p).values) - target).sum()) for p in points])
        best = np.array(optimizer.result.xbest)
        best[1] = max(best[1], math.log(LEAST_TURNS / START[1]) / SPREAD[1])  # beyond, all ramps end at the same pair
        return best

    def _normal(self, *shape: int) -> NDArray[np.float64]:
        return self.rng.standard_normal(shape)

    def _ramp(self, point: NDArray[np.float64]) -> Candidate:
        """The ramp at a point, [3], in standard deviations from the start."""
        first, last = (
            pair_with_turns(self.space, turns * math.exp(spread * float(step)))
            for turns, spread, step in zip(START, SPREAD, point[:2], strict=False)
        )
        last = min(max(last, first + 1), pair_with_turns(self.space, LEAST_TURNS))
        bend = START[2] + SPREAD[2] * float(point[2])
        ramp = Ramp(min(first, last - 1), last, largest_factor(self.space), bend)
        return self.space.candidate(ramp.values(self.space.pairs), origin="ramp")

    def _mutant(self, parents: list[Candidate]) -> Candidate:
        parent = parents[int(len(parents) * self.rng.random() ** 2)]  # the better, the more often
        if self.rng.random() >= self.block_share:
            return mutant(self, parent, self.probability)
        start = int(self.rng.integers(self.space.pinned, self.space.pairs))
        stop = start + int(self.rng.integers(1, max(self.space.pairs // 3, 1), endpoint=True))
        factor = math.exp(0.15 * self.rng.standard_normal())
        values = scale_block(np.array(parent.values), start, stop, factor, monotone=self.space.monotone)
        return self.space.candidate(values, parent.start_tokens, "block")


def largest_factor(space: SearchSpace) -> float:
    """The extension ratio, within the space; where nothing is extended, the largest factor of the space."""
    low, high = (1 + space.step * gene for gene in space.gene_bounds)
    return min(max(space.scale, low), high) if space.scale > 1 else high


def pair_with_turns(space: SearchSpace, turns: float) -> float:
    """The pair, fractions allowed, that turns so often in the pretrained window."""
    assert space.pretrained_length is not None
    wavelength = space.pretrained_length / (turns * 2 * math.pi)
    return space.pairs * math.log(wavelength) / math.log(space.base)


def yarn_ramp(space: SearchSpace) -> Ramp:
    """The ramp that is YaRN: from the pair with 32 turns over the original length to that with one."""
    space = replace(space, pretrained_length=space.original_length)
    first = max(math.floor(pair_with_turns(space, 32)), 0)
    last = min(math.ceil(pair_with_turns(space, 1)), space.rotary_size - 1)
    return Ramp(first, max(last, first + 0.001), space.scale, bend=-1)
