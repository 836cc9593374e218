"""Policy ``best_fit``: whole documents side by side in rows, isolated from each other, with few cuts and few pads.

A document that fits a row is never cut; a longer one is cut in consecutive pieces as long as a row can be, which are
the fewest. Every piece begins with BOS, and EOS follows where the document ends. The pieces are packed best-fit
decreasing: the longest first, each into the fullest row that still has room for it ("Fewer Truncations Improve Language
Modeling", arXiv:2404.10830). With ``seq_len = 8`` and the documents abcdefghij, klm, no and p::

    pieces   ^abcdefg  ^hij$  ^klm$  ^no$  ^p$
    row 0    ^ a b c d e f g
    row 1    ^ h i j $ ^ p $
    row 2    ^ k l m $ _ _ _        which has no room for ^no$
    row 3    ^ n o $ _ _ _ _

Every text token is in exactly one row. An EOS that would be alone in its piece is left out.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_longrope.packing.documents import Documents
from lightning_longrope.packing.rows import IGNORED, Row, Rows


@dataclass(frozen=True)
class Bins:
    """Pieces of documents, sorted by the row they are in.

    Attributes:
        documents: Numbers of their documents, [pieces].
        pieces: Which piece of its document each is, [pieces] uint32.
        ends: Pieces of the rows up to each, itself included, [rows] int64.
        tokens: Tokens of all pieces, markers included.
    """

    documents: NDArray[Any]
    pieces: NDArray[np.uint32]
    ends: NDArray[np.int64]
    tokens: int


class BestFitRows(Rows[Bins]):
    """Rows of policy ``best_fit``; see the drawing at the top of this module.

    Where an ``order`` gives other documents every epoch, every epoch has as many rows as epoch 0: one with more rows
    leaves the emptiest ones out, one with fewer begins again. An epoch without a document reads those of the next one
    that has some.

    Args:
        documents: The tokenised documents.
        longest: Tokens of the longest piece, markers included; ``seq_len`` if None.
        options: See ``Rows``.
    """

    policy = "best_fit"
    isolated = True

    def __init__(self, documents: Documents, *, longest: int | None = None, **options: Any) -> None:
        self.longest = min(longest or options["seq_len"], options["seq_len"])
        super().__init__(documents, **options)

    @override
    def _count(self) -> int:
        self._room = self.longest - len(self._head)
        if self._room < 3:
            raise ValueError(f"Pieces of documents need at least 4 tokens with their markers, got {self.longest}.")
        bins = self._lay_out(0)
        if not len(bins.ends):
            raise ValueError("There is no document to pack.")
        self.cuts = int((bins.pieces > 0).sum())
        self.padding = len(bins.ends) * self.seq_len - bins.tokens
        return len(bins.ends)

    @override
    def _lay_out(self, epoch: int) -> Bins:
        order = self._usable_order(epoch)
        bodies = self.documents.lengths[order] + len(self._foot)
        counts = -(-bodies // self._room)
        counts -= (counts > 1) & (bodies % self._room == 1) & (len(self._foot) == 1)  # an EOS alone
        pieces = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        sizes = np.minimum(self._room, np.repeat(bodies, counts) - pieces * self._room) + len(self._head)
        bins = self._rows_of(sizes)
        fullest = np.argsort(-np.bincount(bins, sizes), kind="stable")  # rows, the fullest first
        by_row = np.argsort(np.argsort(fullest)[bins], kind="stable")
        ends = np.cumsum(np.bincount(bins)[fullest])
        return Bins(np.repeat(order, counts)[by_row], pieces[by_row].astype(np.uint32), ends, int(sizes.sum()))

    def _rows_of(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row of each piece, [pieces] int64."""
        return best_fit_decreasing(sizes, self.seq_len)

    @override
    def _cut(self, layout: Bins, number: int) -> Row:
        number %= len(layout.ends)
        first, last = (int(layout.ends[number - 1]) if number else 0), int(layout.ends[number])
        parts = [
            self._piece(int(document), int(piece))
            for document, piece in zip(layout.documents[first:last], layout.pieces[first:last], strict=True)
        ]
        ends = np.cumsum([len(part) for part in parts])
        starts, padding = np.concatenate([[0], ends[:-1]]), self.seq_len - int(ends[-1])
        filling = self.eos if self.eos is not None else self.bos or 0
        tokens = np.concatenate([*parts, np.full(padding, filling)])
        labels = tokens.copy()
        labels[starts] = IGNORED
        labels[self.seq_len - padding :] = IGNORED
        return Row(tokens, labels, starts, padding, isolated=True)

    def _piece(self, document: int, piece: int) -> NDArray[np.int64]:
        """A piece of a document with its markers."""
        start, length = int(self.documents.starts[document]), int(self.documents.lengths[document])
        first, last = piece * self._room, (piece + 1) * self._room
        text = self.documents.tokens[start + first : start + min(last, length)].astype(np.int64)
        return np.concatenate([self._head, text, self._foot if last > length else self._foot[:0]])


def best_fit_decreasing(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Bin of each item, the items taken from the largest to the smallest and each put where least room is left over.

    Items of one size are placed together: bins with the same room left are a group, and each takes as many of the items
    as it can before the next one is looked for. So the work in Python grows with the number of different sizes and
    rooms rather than with the number of items.

    Args:
        sizes: Size of each item, [items], between 1 and ``capacity``; there may be none.
        capacity: Size of a bin.

    Returns:
        [items] int64, bins numbered from 0. No more than 11/9 of the fewest bins possible, and one.
    """
    if not len(sizes):
        return np.empty(0, np.int64)
    by_size = np.argsort(-sizes, kind="stable")
    distinct, firsts = np.unique(-sizes[by_size], return_index=True)
    bins = np.empty(len(sizes), np.int64)
    groups: dict[int, list[NDArray[np.int64]]] = {}  # room left -> bins that have it
    rooms: list[int] = []  # the keys, sorted
    opened = 0

    def put_back(room: int, group: NDArray[np.int64]) -> None:
        if room and len(group):
            if room not in groups:
                groups[room] = []
                insort(rooms, room)
            groups[room].append(group)

    for size, items in zip((-distinct).tolist(), np.split(by_size, firsts[1:]), strict=True):
        done = 0
        while done < len(items):
            left, place = len(items) - done, bisect_left(rooms, size)
            room = rooms[place] if place < len(rooms) else capacity
            each = room // size
            if place < len(rooms):
                group = groups[room].pop()
                if not groups[room]:
                    del groups[room], rooms[place]
            else:
                group = np.arange(opened, opened + -(-left // each))
                opened += len(group)
            whole, over = divmod(left, each) if left < each * len(group) else (len(group), 0)
            taken = min(left, each * len(group))
            bins[items[done : done + taken]] = np.repeat(group, each)[:taken]
            put_back(room - each * size, group[:whole])
            if over:
                put_back(room - over * size, group[whole : whole + 1])
            put_back(room, group[whole + bool(over) :])
            done += taken
    return bins
