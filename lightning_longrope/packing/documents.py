"""Tokenised documents as ranges of one flat array: pure numpy, no models, no files."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Documents:
    """Tokenised documents of one split, as ranges of one flat array that may be a memory map.

    Attributes:
        tokens: All tokens, [N], an unsigned integer type.
        starts: First token of every document, [documents] int64.
        lengths: Number of tokens of every document, [documents] int64, each at least 1.
        sources: Number of the source each document is from, [documents] uint16; None where nobody asks.
        source_names: Names of the sources by their numbers.
        hashes: Hash of the tokens of each document, [documents] uint64; None where nobody asks.
    """

    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    sources: NDArray[np.uint16] | None = None
    source_names: tuple[str, ...] = ()
    hashes: NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def total(self) -> int:
        """Number of text tokens."""
        return int(self.lengths.sum())

    def select(self, numbers: NDArray[np.int64]) -> "Documents":
        """The documents with these numbers, in this order; shares the tokens."""
        sources = None if self.sources is None else self.sources[numbers]
        hashes = None if self.hashes is None else self.hashes[numbers]
        return Documents(self.tokens, self.starts[numbers], self.lengths[numbers], sources, self.source_names, hashes)

    def at_least(self, length: int) -> "Documents":
        """The documents of at least ``length`` tokens; itself, not a copy of its index, if that is all of them."""
        enough = self.lengths >= max(1, length)
        return self if enough.all() else self.select(np.flatnonzero(enough))

    def joined(self, limit: int | None = None) -> NDArray[np.int64]:
        """Text of the documents one after another without markers, [N] int64, at most ``limit`` tokens."""
        pieces, room = [np.empty(0, np.int64)], self.total if limit is None else limit
        for start, length in zip(self.starts, self.lengths, strict=True):
            if room <= 0:
                break
            pieces.append(self.tokens[start : start + min(length, room)].astype(np.int64))
            room -= length
        return np.concatenate(pieces)

    def __reduce__(self) -> tuple[Any, ...]:
        """Sends a memory map to worker processes as its path; pickling it would send every token."""
        index = (self.starts, self.lengths, self.sources, self.source_names)
        if isinstance(self.tokens, np.memmap) and self.tokens.filename is not None and not self.tokens.offset:
            return _reopen, (self.tokens.filename, self.tokens.dtype, *index)
        return Documents, (self.tokens, *index)


def _reopen(path: Any, dtype: Any, *index: Any) -> Documents:
    return Documents(np.memmap(path, dtype=dtype, mode="r"), *index)


def longest_text(lengths: NDArray[np.int64], wanted: int) -> str:
    """Words on how many documents there are at which lengths, where none has the ``wanted`` one.

    >>> longest_text(np.array([7, 1]), 8)
    'the longest of 2 has 7 tokens (there are 1 of at least 4, 1 of at least 2, 2 of at least 1)'
    """
    steps = [wanted >> step for step in range(1, 5) if wanted >> step]
    counts = ", ".join(f"{int((lengths >= step).sum())} of at least {step}" for step in steps)
    return f"the longest of {len(lengths)} has {int(lengths.max(initial=0))} tokens (there are {counts or 'no others'})"


def epoch_permutation(size: int, *, seed: int, epoch: int, stream: int) -> NDArray[np.int64]:
    """Permutation of ``size`` things that depends on the arguments alone; ``stream`` keeps its uses independent."""
    return np.random.default_rng([seed, epoch, stream]).permutation(size)
