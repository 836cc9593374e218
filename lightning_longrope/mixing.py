"""Which documents an epoch reads: shares per source, and long documents more often. Pure numpy.

Every document gets a multiplicity, how often an epoch reads it on average. A source whose share of the tokens is more
than it holds repeats its documents; one with less leaves documents out, and another epoch reads those. Long documents
may come more often than short ones of the same source. The sources keep their shares of the tokens then, so the mix of
the data stays what it was (per-source length up-sampling, Fu et al., arXiv:2402.10171).

Nothing is drawn independently. The documents of a source that share a multiplicity m, a stratum, lie one after another
on a line, shortest first, each m long. An epoch reads a document wherever it holds a whole number, and every epoch
shifts the line by m. With m = 3/8::

    document      a       b       c       d       e
    epoch 0   0     0.375   0.75    1.125   1.5     1.875    c holds 1
    epoch 1   0.375 0.75    1.125   1.5     1.875   2.25     b holds 1, e holds 2
    epoch 2   0.75  1.125   1.5     1.875   2.25    2.625    a holds 1, d holds 2

So an epoch holds short and long documents alike and its tokens are those expected, give or take two of the longest
documents a stratum; any 1/m epochs in a row read every document; and any E epochs read each of them E*m times, give or
take less than one. Where the line begins and how equal lengths are ordered comes from the seed.

Numbers: D documents, S sources. Lengths are in tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ONE = 1 << 32
"""Multiplicities are whole numbers of 1 / ``_ONE``: integers meet the whole numbers at one place on every machine."""


@dataclass(frozen=True)
class SourceShare:
    """What an epoch reads of a source.

    Attributes:
        name: The source.
        documents: Documents it has.
        long_documents: How many of these are long.
        tokens: Tokens of all its documents.
        share: Share of an epoch's tokens that are its own, in [0, 1].
        short_repeats: How often an epoch reads one of its short documents, on average.
        long_repeats: The same of a long one, at least ``long_length`` tokens.
    """

    name: str
    documents: int
    long_documents: int
    tokens: int
    share: float
    short_repeats: float
    long_repeats: float


class Mixture:
    """The documents of every epoch, a pure function of the seed and the epoch.

    An epoch is as long as all the documents together, those of sources with weight 0 left out.

    Args:
        lengths: Tokens of every document, [D] int64, each at least 1.
        sources: Number of every document's source, [D], below S.
        names: Names of the sources, S of them.
        weights: Share of the training tokens by source, as numbers that need not sum to 1; 0 leaves a source out. None:
            every source keeps the share it has.
        long_length: Documents of at least this many tokens are long.
        long_weight: How many times more often a long document comes than a short one of the same source.
        seed: Of the orders.

    Attributes:
        multiplicities: How often an epoch reads each document, on average, [D] float64.
        least_tokens: No epoch has fewer text tokens.

    Raises:
        ValueError: If the weights do not name every source that has a document, or are no weights, or all the documents
            of a source with a weight have gone.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        sources: NDArray[np.integer],
        names: Sequence[str],
        weights: Mapping[str, float] | None = None,
        long_length: int | None = None,
        long_weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0 < long_weight < np.inf:
            raise ValueError(f"`long_weight` must be above 0, got {long_weight}.")
        if (long_length is None) != (long_weight == 1):
            raise ValueError(
                "`long_length` (tokens from which a document is long) and `long_weight` (how many times more often it"
                f" comes) go together, got {long_length} and {long_weight}."
            )
        self.seed, self.names = seed, tuple(names)
        kinds = np.asarray(sources, np.int64) * 2 + (lengths >= (np.inf if long_length is None else long_length))
        tokens = np.bincount(kinds, weights=lengths, minlength=2 * len(names))
        self._tokens: NDArray[np.float64] = tokens.astype(np.float64).reshape(-1, 2)  # [S, 2]: short, long
        self._documents = np.bincount(kinds, minlength=2 * len(names)).reshape(-1, 2)
        self._shares = _shares(self._tokens.sum(1), self.names, weights)
        steps = _steps(self._tokens, self._shares, long_weight)
        self._repeats = steps / _ONE
        self.multiplicities = self._repeats.ravel()[kinds]
        self._strata = _strata(lengths, kinds, steps.ravel(), seed)
        self.least_tokens = self.least(lengths)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The documents of an epoch in the order it reads them, int64; copies of one lie far apart."""
        counts = np.concatenate([stratum.counts(epoch) for stratum in self._strata])
        numbers = np.concatenate([stratum.numbers for stratum in self._strata])
        copy = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rng = np.random.default_rng([self.seed, epoch, 0])
        places = (copy + rng.random(len(copy))) / np.repeat(counts, counts)
        return np.repeat(numbers, counts)[np.argsort(places, kind="stable")]

    def least(self, sizes: NDArray[np.int64]) -> int:
        """No epoch reads documents of a smaller size together, [D] int64 being the size of each; of ones, fewer."""
        return sum(stratum.least(sizes) for stratum in self._strata)

    def next_epoch(self, epoch: int, wanted: NDArray[np.bool_]) -> int | None:
        """The first epoch from ``epoch`` on that reads one of the documents ``wanted``, [D]; None if none ever does."""
        found = [stratum.next_epoch(epoch, wanted) for stratum in self._strata if wanted[stratum.numbers].any()]
        return min(found, default=None)

    def summary(self) -> list[SourceShare]:
        """What an epoch reads of every source that has a document."""
        rows = zip(self.names, self._documents, self._tokens, self._shares, self._repeats, strict=True)
        return [
            SourceShare(
                name, int(documents.sum()), int(documents[1]), int(tokens.sum()), float(share), *map(float, repeats)
            )
            for name, documents, tokens, share, repeats in rows
            if documents.sum()
        ]


@dataclass(frozen=True)
class _Stratum:
    """Documents of one multiplicity.

    Attributes:
        numbers: The documents, shortest first, [n] int64.
        step: The multiplicity, in 1 / ``_ONE``.
        begin: Where the line begins in epoch 0, in 1 / ``_ONE``.
    """

    numbers: NDArray[np.int64]
    step: int
    begin: int

    def counts(self, epoch: int) -> NDArray[np.int64]:
        """How often the epoch reads each document, [n] int64."""
        whole, part = divmod(self.step, _ONE)
        edges = np.arange(len(self.numbers) + 1, dtype=np.int64) * part + (self.begin + epoch * part) % _ONE
        return whole + np.diff(edges >> 32)

    def next_epoch(self, epoch: int, wanted: NDArray[np.bool_]) -> int:
        """The first epoch from ``epoch`` on that reads one of the documents ``wanted``, of which it has one."""
        whole, part = divmod(self.step, _ONE)
        if whole:
            return epoch
        edges = (np.flatnonzero(wanted[self.numbers]) * part + (self.begin + epoch * part) % _ONE) % _ONE
        missing = np.maximum(_ONE - part - edges, 0)  # from the right edge of each to the whole number it will hold
        return epoch + int((-(-missing // part)).min())

    def least(self, sizes: NDArray[np.int64]) -> int:
        """The least that the documents on the line have together, wherever it begins, [D] int64 being each one's size.

        Shifted from 0 on, the line's edge i, between documents i - 1 and i, passes a whole number once, if it does not
        lie on one: document i - 1 holds that number from there on, and document i no longer.
        """
        sizes = sizes[self.numbers]
        whole, part = divmod(self.step, _ONE)
        edges = np.arange(len(sizes) + 1, dtype=np.int64) * part
        at_zero = int(np.diff(edges >> 32) @ sizes)
        rest = edges[1:] % _ONE
        order = np.argsort(-rest, kind="stable")[: np.count_nonzero(rest)]
        shifted = at_zero + np.cumsum((sizes - np.append(sizes[1:], 0))[order])
        together = np.diff(rest[order], append=-1) == 0  # edges that pass at once: only all of them count
        return whole * int(sizes.sum()) + int(shifted[~together].min(initial=at_zero))


def _shares(
    tokens: NDArray[np.float64], names: tuple[str, ...], weights: Mapping[str, float] | None
) -> NDArray[np.float64]:
    """Share of every source, [S] float64; they sum to 1."""
    if weights is None:
        return tokens / tokens.sum()
    there = {name for name, count in zip(names, tokens, strict=True) if count}
    if unknown := sorted(set(weights) - set(names)):
        raise ValueError(f"`weights` names {', '.join(unknown)}, but the sources are {', '.join(sorted(names))}.")
    if missing := sorted(there - set(weights)):
        raise ValueError(f"`weights` does not name {', '.join(missing)}: give every source a weight; 0 leaves it out.")
    if empty := sorted(name for name, weight in weights.items() if weight and name not in there):
        raise ValueError(
            f"`weights` gives {', '.join(empty)} a share, but no document of it is there or long enough: give weight 0,"
            " or a smaller `min_document_length`."
        )
    shares = np.array([weights.get(name, 0.0) for name in names], np.float64)
    if not (np.isfinite(shares).all() and shares.min() >= 0 and shares.sum() > 0):
        raise ValueError(f"`weights` must be at least 0, and one of them above, got {dict(weights)}.")
    return shares / shares.sum()


def _steps(tokens: NDArray[np.float64], shares: NDArray[np.float64], long_weight: float) -> NDArray[np.int64]:
    """Multiplicities of short and long documents in 1 / ``_ONE``, [S, 2] int64."""
    relative = np.array([1.0, long_weight])
    total = tokens[shares > 0].sum()
    reads = np.divide(shares * total, tokens @ relative, out=np.zeros_like(shares), where=shares > 0)
    steps = np.rint(reads[:, None] * relative * _ONE)
    return np.where(shares[:, None] > 0, np.maximum(steps, 1), 0).astype(np.int64)


def _strata(
    lengths: NDArray[np.int64], kinds: NDArray[np.int64], steps: NDArray[np.int64], seed: int
) -> list[_Stratum]:
    rng = np.random.default_rng([seed, 0, 3])
    shuffled = rng.permutation(len(lengths))
    ranked = shuffled[np.lexsort((lengths[shuffled], kinds[shuffled]))]  # by kind, then by length
    ends = np.cumsum(np.bincount(kinds, minlength=len(steps)))
    begins = rng.integers(_ONE, size=len(steps))
    return [
        _Stratum(ranked[end - count : end], int(step), int(begin))
        for end, count, step, begin in zip(ends, np.diff(ends, prepend=0), steps, begins, strict=True)
        if count and step
    ]
