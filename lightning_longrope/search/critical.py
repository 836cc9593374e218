"""LongRoPE2's search: evolution over the critical pair and the factors from there on, NTK before it.

Source: LongRoPE2, arXiv:2502.20082, Sections 3.1 and 3.2.
"""

import math
from dataclasses import replace

import numpy as np
from typing_extensions import override

from lightning_longrope.search.algorithm import Generations
from lightning_longrope.search.evolution import EvolutionSearch
from lightning_longrope.search.operators import Genes, crossover, mutate
from lightning_longrope.search.ramp import pair_with_turns
from lightning_longrope.search.space import Candidate, SearchSpace


class LongRoPE2Search(EvolutionSearch):
    """Evolution whose individuals are a critical pair r and rising factors within [s, 2 s] from r on.

    The factors before r follow from that of r: ``factor(r) ** (i / r)``, which is NTK. The critical pair lies between
    the first pair with fewer than ``periods`` turns in the pretrained window and the first that does not finish one.
    Meant for the objective ``needle``, with the keys at the start of the text. Sets the bounds of the space itself:
    no pinned pairs, factors up to 2 s, the fewest start tokens.

    Args:
        population: Size of the first population.
        iterations: Number of generations after it.
        parents: Number of best candidates that have offspring.
        mutants: Mutants per iteration.
        crossovers: Crossovers per iteration.
        probability: Chance of each gene to be redrawn in a mutant.
        periods: Turns that a pair must have made in the pretrained window to lie before every critical pair.
        halve_beyond: Target length in tokens above which population, mutants and crossovers are halved; null for never.
    """

    def __init__(
        self,
        population: int = 64,
        iterations: int = 40,
        parents: int = 32,
        mutants: int = 16,
        crossovers: int = 16,
        probability: float = 0.3,
        periods: float = 10.0,
        halve_beyond: int | None = None,
    ) -> None:
        super().__init__(population, iterations, parents, mutants, crossovers, probability, halve_beyond)
        if not periods >= 1:
            raise ValueError(f"`periods` must be at least 1, got {periods}.")
        self.periods = periods

    @property
    @override
    def searches_start_tokens(self) -> bool:
        return False

    @override
    def adapt(self, space: SearchSpace) -> SearchSpace:
        if space.warm_start is not None:
            raise ValueError(
                "LongRoPE2Search starts from the theoretical critical pair and takes no `warm_start`: leave it out, or"
                " take another algorithm."
            )
        fewest = (min(space.start_tokens),)
        return replace(space, max_factor=2 * space.scale, min_factor=1.0, pinned=0, start_tokens=fewest, monotone=True)

    def _generations(self) -> Generations:
        self._low, self._high = critical_range(self.space, self.periods)
        step = self.space.step
        self._least = math.ceil((self.space.scale - 1) / step - 1e-7)
        self._most = self.space.gene_bounds[1]
        self._made: dict[Candidate, tuple[int, Genes]] = {}
        theory = np.full(self.space.pairs - self._low, self._least)
        yield from self._evolve([self._candidate(self._high, theory, "seed:theory")])

    @override
    def _mutant(self, parents: list[Candidate]) -> Candidate:
        pair, genes = self._made[parents[self.rng.integers(len(parents))]]
        if self.rng.random() < self.probability:
            pair = int(self.rng.integers(self._low, self._high, endpoint=True))
        return self._candidate(pair, mutate(genes, self.probability, self._least, self._most, self.rng), "mutant")

    @override
    def _child(self, parents: list[Candidate]) -> Candidate:
        if len(parents) == 1:
            return parents[0]
        both = [self._made[parents[i]] for i in self.rng.choice(len(parents), size=2, replace=False)]
        genes = crossover(both[0][1], both[1][1], self.rng)
        return self._candidate(both[self.rng.integers(2)][0], genes, "crossover")

    @override
    def _anywhere(self) -> Candidate:
        genes = np.sort(self.rng.integers(self._least, self._most, self.space.pairs - self._low, endpoint=True))
        return self._candidate(int(self.rng.integers(self._low, self._high, endpoint=True)), genes, "random")

    def _candidate(self, pair: int, genes: Genes, origin: str) -> Candidate:
        """The candidate of a critical pair and the genes of every pair that could be critical or comes after."""
        free = 1 + self.space.step * genes[pair - self._low :]
        before = free[0] ** (np.arange(pair) / max(pair, 1))
        candidate = self.space.candidate(np.concatenate([before, free]), origin=origin)
        self._made[candidate] = pair, genes
        return candidate


def critical_range(space: SearchSpace, periods: float = 10.0) -> tuple[int, int]:
    """First and last pair that may be the critical one, counted from 0.

    The last is the theoretical one, the first pair that does not finish a turn in the pretrained window:
    46 for LLaMA 2 (4,096 tokens), 35 for LLaMA 3 (8,192).
    """
    first, last = (math.ceil(pair_with_turns(space, turns)) for turns in (periods, 1.0))
    last = min(max(last, 0), space.pairs - 1)
    return min(max(first, 0), last), last
