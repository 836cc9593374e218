"""Variation operators on genes: pure functions of arrays and a random generator.

Each satisfies the rising order by construction, in one pass, so none ever rejects and tries again.
Notation: G genes, whole grid steps above 1, [G] int64, rising where ``monotone``.
"""

import numpy as np
from numpy.typing import NDArray

Genes = NDArray[np.int64]
Values = NDArray[np.float64]


def project(steps: Values, low: int, high: int, *, monotone: bool) -> Genes:
    """The nearest whole steps within the bounds; where ``monotone``, each raised to the largest before it.

    Args:
        steps: Grid steps above 1, [G], fractions allowed.
        low: Smallest gene allowed.
        high: Largest gene allowed.
        monotone: Whether the result must rise.
    """
    genes = np.rint(np.clip(steps, low, high)).astype(np.int64)
    return np.maximum.accumulate(genes) if monotone else genes


def mutate(
    genes: Genes, probability: float, low: int, high: int, rng: np.random.Generator, *, monotone: bool = True
) -> Genes:
    """Redraws each gene with ``probability``, uniformly on the grid where the order leaves room.

    A maximal run of redrawn genes is drawn between the kept genes on its two sides and sorted:

        genes   3   5   6   9   12      redraw  .  x  x  .  x
        run 1   two draws from [3, 9], sorted
        run 2   one draw from [9, high]

    So the genes that are not redrawn keep their value, and the others can reach every rising arrangement.
    """
    child = genes.copy()
    redrawn = rng.random(len(genes)) < probability
    if not monotone:
        child[redrawn] = rng.integers(low, high, size=int(redrawn.sum()), endpoint=True)
        return child
    edges = np.flatnonzero(np.diff(np.concatenate([[False], redrawn, [False]])))
    for start, stop in edges.reshape(-1, 2):
        floor = genes[start - 1] if start else low
        ceiling = genes[stop] if stop < len(genes) else high
        child[start:stop] = np.sort(rng.integers(floor, ceiling, size=stop - start, endpoint=True))
    return child


def crossover(mother: Genes, father: Genes, rng: np.random.Generator, *, monotone: bool = True) -> Genes:
    """Takes each gene from either parent, or from the other one where the order would break.

    The other parent always fits: the gene before came from one of the two, whose own next gene is no smaller.
    Walking up, a break is always mended upwards; so half of the walks go down, and there is no drift.
    """
    parents = np.stack([mother, father])  # [2, G]
    choice = rng.integers(2, size=len(mother))
    up = rng.random() < 0.5
    if monotone:
        sign = 1 if up else -1
        walk = sign * parents[:, ::sign]  # rising, whichever way
        choice = choice[::sign].copy()
        for i in range(1, len(choice)):
            if walk[choice[i], i] < walk[choice[i - 1], i - 1]:
                choice[i] = 1 - choice[i]
        choice = choice[::sign]
    return parents[choice, np.arange(len(mother))]


def scale_block(values: Values, start: int, stop: int, factor: float, *, monotone: bool = True) -> Values:
    """Multiplies the neighbours ``[start, stop)`` by one factor; the others give way where the order breaks.

    Args:
        values: Rescale factors (not genes), [N], rising where ``monotone``.
        start: First of the block.
        stop: One past the last of the block.
        factor: Positive multiplier.
        monotone: Whether pairs above are raised, or pairs below lowered, to keep the order.
    """
    child = values.copy()
    child[start:stop] *= factor
    if not monotone:
        return child
    if factor > 1:
        return np.maximum.accumulate(child)
    return np.minimum.accumulate(child[::-1])[::-1]
