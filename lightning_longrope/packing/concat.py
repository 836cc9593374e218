"""Policy ``concat``: documents joined to one stream that is cut every ``seq_len - 2`` tokens.

The documents of a split, in an order drawn anew every epoch, are joined with EOS BOS between two documents. Every piece
of the stream is bookended by BOS and EOS, which makes the segments "of exactly the window, bookended by BOS and EOS" of
LongRoPE (arXiv:2402.13753). With ``seq_len = 8``, ``^`` for BOS, ``$`` for EOS and the documents abcdefgh, ijk and
lmnop::

    stream   a b c d e f g h $ ^ i j k $ ^ l m n o p
    cut      a b c d e f|g h $ ^ i j|k $ ^ l m n|o p
    row 0  ^ a b c d e f $
    row 1              ^ g h $ ^ i j $
    row 2                          ^ k $ ^ l m n $
    tail                                         o p    dropped and counted; the next epoch cuts another tail

Every text token is in exactly one row or in the tail, and no row is padded. A cut may fall next to a separator: that
row begins or ends with a marker twice, and no text is lost. A tokenizer without BOS or EOS leaves that marker out
everywhere; one token that serves as both (GPT-2) bookends both sides and stands once between documents that see each
other.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_longrope.packing.documents import Documents
from lightning_longrope.packing.rows import IGNORED, Row, Rows, bookended_labels, joined

BLOCK = 64  # documents between two places of the stream that are remembered


@dataclass(frozen=True)
class Stream:
    """The documents of an epoch in a line.

    Attributes:
        order: Numbers of the documents, [documents].
        begins: Place of every ``BLOCK``-th document in the stream, [documents / BLOCK] int64.
        size: Places of the stream.
        rows: Rows it fills.
    """

    order: NDArray[Any]
    begins: NDArray[np.int64]
    size: int
    rows: int


class ConcatRows(Rows[Stream]):
    """Rows of policy ``concat``; see the drawing at the top of this module.

    Does not bookend documents one by one. Where an ``order`` gives other documents every epoch, every epoch has as many
    rows as the shortest one fills; one that does not fill any reads on into the next.

    Args:
        documents: The tokenised documents.
        isolate: Whether the documents of a row must not see each other. EOS and BOS then both stand between them, even
            if one token serves as both.
        options: See ``Rows``.
    """

    policy = "concat"

    def __init__(self, documents: Documents, *, isolate: bool = False, **options: Any) -> None:
        self.isolated = isolate
        super().__init__(documents, **options)

    @override
    def _count(self) -> int:
        shared = self.bos == self.eos and not self.isolated
        self._separator = self._foot if shared else np.concatenate([self._foot, self._head])
        self._room = self.seq_len - len(self._head) - len(self._foot)
        lengths, separator = self._read_lengths, len(self._separator)
        stream = int(lengths.sum()) + separator * max(0, len(lengths) - 1)
        if stream < self._room:
            raise ValueError(
                f"{len(lengths)} documents of {int(lengths.sum())} tokens together do not fill one row of `seq_len`"
                f" {self.seq_len}: give more text or a shorter window."
            )
        rows = stream // self._room
        if self._order is not None:
            rows = max(1, (self._order.least(self.documents.lengths + separator) - separator) // self._room)
            stream = self._lay_out(0).size
        self.tail = stream - rows * self._room
        return rows

    @override
    def _lay_out(self, epoch: int) -> Stream:
        stream = self._stream(self._document_order(epoch))
        while not stream.rows:
            assert self._order is not None, "documents that are all read fill a row"
            later = self._order.next_epoch(epoch + 1, np.ones(len(self.documents), bool))
            assert later is not None, "the documents that any epoch reads fill a row together"
            stream = self._stream(np.concatenate([stream.order, self._document_order(later)]))
            epoch = later
        return stream

    def _stream(self, order: NDArray[Any]) -> Stream:
        """The documents with these numbers in a line."""
        sizes = [np.zeros(1, np.int64)]
        for first in range(0, len(order), BLOCK << 14):  # a million documents at a time
            lengths = self.documents.lengths[order[first : first + (BLOCK << 14)]] + len(self._separator)
            sizes.append(np.add.reduceat(lengths, np.arange(0, len(lengths), BLOCK)))
        begins = np.cumsum(np.concatenate(sizes))
        size = max(0, int(begins[-1]) - len(self._separator))
        return Stream(order, begins[:-1], size, size // self._room)

    @override
    def _cut(self, layout: Stream, number: int) -> Row:
        first, last = number * self._room, (number + 1) * self._room  # places in the stream, last exclusive
        documents, begins = self._between(layout, first, last)
        met = slice(np.searchsorted(begins, first, "right") - 1, np.searchsorted(begins, last))
        pieces = [p for unit in zip(documents[met], begins[met], strict=True) for p in self._pieces(*unit, first, last)]
        tokens = joined([self._head, *pieces, self._foot], self.seq_len)
        opened = begins - len(self._head) - first  # a document begins with its BOS
        starts = np.concatenate([[0], opened[(opened > 0) & (opened < self._room)] + len(self._head)])
        labels = bookended_labels(tokens, self.bos, self.eos)
        if self.isolated or self.bos is None or self.bos != self.eos:
            labels[starts] = IGNORED  # but a token that serves both documents says that the first one ends
        return Row(tokens, labels, starts, isolated=self.isolated)

    def _between(self, layout: Stream, first: int, last: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Numbers and places of the documents around places ``first`` to ``last``, and of the one after them."""
        low = int(np.searchsorted(layout.begins, first, "right")) - 1
        high = int(np.searchsorted(layout.begins, last + len(self._separator), "right"))
        documents = layout.order[low * BLOCK : high * BLOCK]
        sizes = self.documents.lengths[documents] + len(self._separator)
        return documents, layout.begins[low] + np.cumsum(sizes) - sizes

    def _pieces(self, document: int, begin: int, first: int, last: int) -> list[NDArray[Any]]:
        """What places ``first`` to ``last`` of the stream hold of a document and of the separator after it."""
        start, length = int(self.documents.starts[document]), int(self.documents.lengths[document])
        low, high = max(0, first - int(begin)), last - int(begin)
        text = self.documents.tokens[start + min(low, length) : start + min(high, length)]
        return [text, self._separator[max(0, low - length) : max(0, high - length)]]
