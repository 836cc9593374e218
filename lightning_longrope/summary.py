"""What a datamodule holds and yields, as numbers: sources, lengths of documents, rows of an epoch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_longrope.mixing import Mixture, SourceShare
from lightning_longrope.packing import Documents, Rows

MOST_CLASSES = 8


@dataclass(frozen=True)
class SourceSummary:
    """Documents of one source.

    Attributes:
        share: What an epoch reads of it.
        longest: Tokens of its longest document.
        documents: Documents of each length class, [C] int64.
        tokens: Tokens of those, [C] int64.
    """

    share: SourceShare
    longest: int
    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]


@dataclass(frozen=True)
class SplitSummary:
    """A split of a datamodule.

    Attributes:
        split: ``train``, ``validation`` or ``test``.
        bounds: Shortest length of every class but the first, which begins with 1, [C - 1].
        sources: In the order of their tokens, the most first.
        rows: Its rows, which know how many of each kind there are and what they leave out.
        mixed: Whether an epoch reads the documents in other shares than they have.
    """

    split: str
    bounds: tuple[int, ...]
    sources: tuple[SourceSummary, ...]
    rows: Rows[Any]
    mixed: bool

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(source.share.tokens for source in self.sources)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(source.share.documents for source in self.sources)


def length_bounds(lengths: NDArray[np.int64]) -> tuple[int, ...]:
    """Powers of two that part lengths in at most ``MOST_CLASSES`` classes, the longest documents told apart best.

    >>> length_bounds(np.array([3, 900, 5000]))
    (64, 128, 256, 512, 1024, 2048, 4096)
    """
    top = int(lengths.max()).bit_length()
    low = max(int(lengths.min()).bit_length(), top - MOST_CLASSES + 1)
    return tuple(1 << power for power in range(low, top))


def summarise(split: str, documents: Documents, rows: Rows[Any], mixture: Mixture | None = None) -> SplitSummary:
    """Counts a split.

    Args:
        split: Its name.
        documents: Its documents.
        rows: The rows made of them.
        mixture: Which documents an epoch reads, if not each of them once.
    """
    bounds = length_bounds(documents.lengths)
    names = documents.source_names or ("",)
    sources = documents.sources if documents.sources is not None else np.zeros(len(documents), np.uint16)
    shares = (mixture or Mixture(documents.lengths, sources, names)).summary()
    classes = np.searchsorted(bounds, documents.lengths, side="right")
    cells = sources.astype(np.int64) * (len(bounds) + 1) + classes
    shape = len(names), len(bounds) + 1
    counts = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
    tokens = np.bincount(cells, documents.lengths, shape[0] * shape[1]).astype(np.int64).reshape(shape)
    longest = np.zeros(len(names), np.int64)
    np.maximum.at(longest, sources, documents.lengths)
    of = {name: place for place, name in enumerate(names)}
    found = [SourceSummary(s, int(longest[of[s.name]]), counts[of[s.name]], tokens[of[s.name]]) for s in shares]
    found.sort(key=lambda source: -source.share.tokens)
    return SplitSummary(split, bounds, tuple(found), rows, mixture is not None)
