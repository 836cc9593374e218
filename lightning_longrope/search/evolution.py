"""The paper's search: an elitist evolution over every factor and the start tokens.

Source: LongRoPE, arXiv:2402.13753, Algorithm 1 and Section 3.3.
"""

from functools import partial

from typing_extensions import override

from lightning_longrope.search.algorithm import Generations, SearchAlgorithm
from lightning_longrope.search.operators import crossover, mutate
from lightning_longrope.search.space import Candidate


class EvolutionSearch(SearchAlgorithm):
    """Evolution as published: 64 + 40 x 32 = 1,344 evaluations, half of it beyond 512k tokens.

    The first population is linear, NTK, YaRN and mutants of them. Each iteration takes the best of all candidates so
    far as parents, and adds mutants and crossovers of them.

    Args:
        population: Size of the first population (P).
        iterations: Number of generations after it (T).
        parents: Number of best candidates that have offspring.
        mutants: Mutants per iteration (N1).
        crossovers: Crossovers per iteration (N2).
        probability: Chance of each gene to be redrawn in a mutant (p).
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
        halve_beyond: int | None = 512 * 1024,
    ) -> None:
        check_counts(population=population, iterations=iterations, parents=parents, offspring=mutants + crossovers)
        check_counts(least=0, mutants=mutants, crossovers=crossovers)
        check_share(probability=probability)
        self.population = population
        self.iterations = iterations
        self.parents = parents
        self.mutants = mutants
        self.crossovers = crossovers
        self.probability = probability
        self.halve_beyond = halve_beyond

    @property
    @override
    def kept(self) -> int:
        return self.parents

    def _generations(self) -> Generations:
        yield from self._evolve(list(dict.fromkeys(self.space.seeds())))

    def _evolve(self, seeds: list[Candidate]) -> Generations:
        """The first population, from seeds and mutants of them, and the generations after it."""
        halved = self.halve_beyond is not None and self.space.target_length > self.halve_beyond
        population, mutants, crossovers = (
            # Halves are rounded up: a single mutant stays one.
            (number + 1) // 2 if halved else number
            for number in (self.population, self.mutants, self.crossovers)
        )
        yield self._new(population - len(seeds), partial(self._mutant, seeds), seeds[:population])
        for _ in range(self.iterations):
            parents = self.ranked()[: self.parents]
            offspring = self._new(mutants, partial(self._mutant, parents))
            yield self._new(crossovers, partial(self._child, parents), offspring)

    def _mutant(self, parents: list[Candidate]) -> Candidate:
        return mutant(self, parents[self.rng.integers(len(parents))], self.probability)

    def _child(self, parents: list[Candidate]) -> Candidate:
        return child(self, parents)


def mutant(search: SearchAlgorithm, parent: Candidate, probability: float) -> Candidate:
    """The paper's mutation of every gene, start tokens and attention factor included."""
    space, rng = search.space, search.rng
    genes = mutate(space.encode(parent), probability, *space.gene_bounds, rng, monotone=space.monotone)
    tokens, attention = parent.start_tokens, parent.attention_factor
    if rng.random() < probability:
        tokens = space.start_tokens[rng.integers(len(space.start_tokens))]
    if len(space.attention_factors) > 1 and rng.random() < probability:
        attention = space.attention_factors[rng.integers(len(space.attention_factors))]
    return space.decode(genes, tokens, "mutant", attention)


def child(search: SearchAlgorithm, parents: list[Candidate]) -> Candidate:
    """The paper's crossover of two different parents, or a copy where there is only one."""
    space, rng = search.space, search.rng
    if len(parents) == 1:
        return parents[0]
    mother, father = (parents[i] for i in rng.choice(len(parents), size=2, replace=False))
    genes = crossover(space.encode(mother), space.encode(father), rng, monotone=space.monotone)
    tokens = (mother, father)[rng.integers(2)].start_tokens
    attention = mother.attention_factor
    if father.attention_factor != attention and rng.random() < 0.5:
        attention = father.attention_factor
    return space.decode(genes, tokens, "crossover", attention)


def check_counts(least: int = 1, **counts: int) -> None:
    """Refuses counts below ``least``, naming the argument."""
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"`{name}` must be at least {least}, got {count}.")


def check_share(**shares: float) -> None:
    """Refuses what is not between 0 (excluded) and 1, naming the argument."""
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"`{name}` must be above 0 and at most 1, got {share}.")
