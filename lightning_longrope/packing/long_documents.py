"""Policy ``document``: every row is one long document, or a piece of one, and nothing else.

Only documents of at least ``seq_len`` tokens are read. A document followed by its EOS is cut in as many consecutive
pieces of ``seq_len - 1`` tokens as it holds, each opened by BOS; where the first piece begins is drawn anew every epoch
from what is left over, so that over the epochs all of its text is read. With ``seq_len = 6`` and the document
abcdefghijklm, which holds two pieces and four tokens more::

    epoch 0   . . . ^ d e f g h   ^ i j k l m   .        rows ^defgh and ^ijklm
    epoch 1   . ^ b c d e f   ^ g h i j k   . . .        rows ^bcdef and ^ghijk
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_longrope.packing.documents import longest_text
from lightning_longrope.packing.rows import IGNORED, Row, Rows


@dataclass(frozen=True)
class Pieces:
    """The documents of an epoch that are long enough.

    Attributes:
        order: Their numbers, [documents].
        offsets: Where the first piece of each begins in it, [documents] int64.
        ends: Rows of the documents up to each, itself included, [documents] int64.
    """

    order: NDArray[Any]
    offsets: NDArray[np.int64]
    ends: NDArray[np.int64]


class LongDocumentRows(Rows[Pieces]):
    """Rows of policy ``document``; see the drawing at the top of this module.

    Where an ``order`` gives other documents every epoch, every epoch has as many rows as epoch 0: one with more rows
    leaves the last ones out, one with fewer begins again. An epoch without a document that is long enough reads those
    of the next one that has some.
    """

    policy = "document"

    @override
    def _count(self) -> int:
        self._room = self.seq_len - len(self._head)
        pieces = self._lay_out(0)
        if not len(pieces.order):
            raise ValueError(_none_long_enough(self._read_lengths, self.seq_len))
        rows = int(pieces.ends[-1])
        self.tail = int(self.documents.lengths[pieces.order].sum()) + len(self._foot) * len(pieces.order)
        self.tail -= rows * self._room
        self.cuts = rows - len(pieces.order)
        return rows

    @override
    def _lay_out(self, epoch: int) -> Pieces:
        order = self._usable_order(epoch, self.documents.lengths >= self.seq_len)
        counts, slack = np.divmod(self.documents.lengths[order] + len(self._foot), self._room)
        offsets = np.zeros_like(slack)
        if self.shuffle:
            offsets = np.random.default_rng([self.seed, epoch, 3]).integers(0, slack + 1)
        return Pieces(order, offsets, np.cumsum(counts))

    @override
    def _cut(self, layout: Pieces, number: int) -> Row:
        number %= int(layout.ends[-1])
        place = int(np.searchsorted(layout.ends, number, "right"))
        piece = number - (int(layout.ends[place - 1]) if place else 0)
        document = layout.order[place]
        start, length = int(self.documents.starts[document]), int(self.documents.lengths[document])
        first = int(layout.offsets[place]) + piece * self._room
        last = first + self._room
        text = self.documents.tokens[start + first : start + min(last, length)].astype(np.int64)
        tokens = np.concatenate([self._head, text, self._foot[: last - length] if last > length else self._foot[:0]])
        labels = tokens.copy()
        labels[0] = IGNORED
        return Row(tokens, labels, np.zeros(1, np.int64))


def _none_long_enough(lengths: NDArray[np.int64], seq_len: int) -> str:
    """One line on the lengths there are."""
    return (
        f"`packing: document` needs documents of at least `seq_len` {seq_len} tokens, but"
        f" {longest_text(lengths, seq_len)}: choose a smaller `seq_len`, `packing: concat`, or longer documents."
    )
