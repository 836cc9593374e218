"""Documents to training rows of exactly one window: pure numpy, no models, no files.

Policy ``concat``: the documents of a split, in an order drawn anew every epoch, are joined to one stream, with EOS BOS
between two documents. The stream is cut every ``seq_len - 2`` tokens and every piece is bookended by BOS and EOS, which
makes the segments "of exactly the window, bookended by BOS and EOS" of LongRoPE (arXiv:2402.13753). With
``seq_len = 8``, ``^`` for BOS, ``$`` for EOS and the documents abcdefgh, ijk and lmnop::

    stream   a b c d e f g h $ ^ i j k $ ^ l m n o p
    cut      a b c d e f|g h $ ^ i j|k $ ^ l m n|o p
    row 0  ^ a b c d e f $
    row 1              ^ g h $ ^ i j $
    row 2                          ^ k $ ^ l m n $
    tail                                         o p    dropped and counted; the next epoch cuts another tail

Every text token is in exactly one row or in the tail, and no row is padded. A cut may fall next to a separator: that
row begins or ends with a marker twice, and no text is lost. A tokenizer without BOS or EOS leaves that marker out
everywhere; one token that serves as both (GPT-2) bookends both sides and stands once between documents.

Rows are cut out of the flat token file when they are asked for: a row depends on (seed, epoch, seq_len, index) alone,
so another window needs no second tokenising and resuming is arithmetic.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
"""Label of a token that is not to be predicted."""


@dataclass(frozen=True)
class Documents:
    """Tokenised documents of one split, as ranges of one flat array that may be a memory map.

    Attributes:
        tokens: All tokens, [N], an unsigned integer type.
        starts: First token of every document, [documents] int64.
        lengths: Number of tokens of every document, [documents] int64, each at least 1.
        sources: Number of the source each document is from, [documents] uint16; None where nobody asks.
    """

    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    sources: NDArray[np.uint16] | None = None

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def total(self) -> int:
        """Number of text tokens."""
        return int(self.lengths.sum())

    def select(self, numbers: NDArray[np.int64]) -> "Documents":
        """The documents with these numbers, in this order; shares the tokens."""
        sources = None if self.sources is None else self.sources[numbers]
        return Documents(self.tokens, self.starts[numbers], self.lengths[numbers], sources)

    def at_least(self, length: int) -> "Documents":
        """The documents of at least ``length`` tokens."""
        return self.select(np.flatnonzero(self.lengths >= max(1, length)))

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
        if isinstance(self.tokens, np.memmap) and self.tokens.filename is not None and not self.tokens.offset:
            return _reopen, (self.tokens.filename, self.tokens.dtype, self.starts, self.lengths, self.sources)
        return Documents, (self.tokens, self.starts, self.lengths, self.sources)


def _reopen(path: Any, dtype: Any, *index: Any) -> Documents:
    return Documents(np.memmap(path, dtype=dtype, mode="r"), *index)


def epoch_permutation(size: int, *, seed: int, epoch: int, stream: int) -> NDArray[np.int64]:
    """Permutation of ``size`` things that depends on the arguments alone; ``stream`` keeps its uses independent."""
    return np.random.default_rng([seed, epoch, stream]).permutation(size)


class PackedRows:
    """The rows that policy ``concat`` makes of the documents of a split; see the drawing at the top of this module.

    Does not bookend documents one by one, and does not mask attention between the documents of a row.

    Args:
        documents: The tokenised documents.
        seq_len: Tokens of a row, bookends included; at least 4.
        bos: Token that opens a row, or None if the tokenizer has none.
        eos: Token that closes a row, or None if the tokenizer has none.
        seed: Of the orders of documents and rows.
        shuffle: False keeps the documents and rows in their order in every epoch.
        extra_share: Share of all rows, in [0, 1), that the caller makes in another way: they get places among ours and
            the numbers from ``text_rows`` on.

    Raises:
        ValueError: If ``seq_len`` is below 4, ``extra_share`` is out of range or the documents do not fill one row.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        seq_len: int,
        bos: int | None,
        eos: int | None,
        seed: int = 0,
        shuffle: bool = True,
        extra_share: float = 0.0,
    ) -> None:
        if seq_len < 4:
            raise ValueError(f"`seq_len` must be at least 4 (BOS, two tokens of text, EOS), got {seq_len}.")
        if not 0 <= extra_share < 1:
            raise ValueError(f"`extra_share` must be at least 0 and below 1, got {extra_share}.")
        self.documents, self.seq_len, self.seed, self.shuffle = documents, seq_len, seed, shuffle
        self.bos, self.eos = bos, eos
        self._head = np.array([bos] if bos is not None else [], np.int64)
        self._foot = np.array([eos] if eos is not None else [], np.int64)
        self._separator = self._foot if bos == eos else np.concatenate([self._foot, self._head])
        self._room = seq_len - len(self._head) - len(self._foot)
        self._stream = documents.total + len(self._separator) * max(0, len(documents) - 1)
        self.text_rows = self._stream // self._room
        if not self.text_rows:
            raise ValueError(
                f"{len(documents)} documents of {documents.total} tokens together do not fill one row of"
                f" `seq_len` {seq_len}: give more text or a shorter window."
            )
        self.extra_rows = round(self.text_rows * extra_share / (1 - extra_share))
        self._epoch: int | None = None

    def __len__(self) -> int:
        return self.text_rows + self.extra_rows

    @property
    def tail(self) -> int:
        """Tokens at the end of an epoch's stream that fill no row and are left out, separators included."""
        return self._stream % self._room

    def number(self, epoch: int, index: int) -> int:
        """Number of the row at place ``index`` of an epoch: below ``text_rows`` one of ours, from there on an extra."""
        self._enter(epoch)
        return int(self._row_order[index])

    def row(self, epoch: int, number: int) -> NDArray[np.int64]:
        """Row ``number`` of an epoch's stream, [seq_len] int64."""
        if not 0 <= number < self.text_rows:
            raise IndexError(f"row {number} of {self.text_rows}")
        self._enter(epoch)
        first, last = number * self._room, (number + 1) * self._room  # places in the stream, last exclusive
        met = np.searchsorted(self._begins, [first + 1, last]) - [1, 0]  # documents, by their place in the order
        pieces = [piece for unit in range(*met) for piece in self._pieces(unit, first, last)]
        row = np.concatenate([self._head, *pieces, self._foot])
        assert len(row) == self.seq_len, f"row {number} has {len(row)} tokens"
        return row

    def labels(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row itself, not shifted, with ``IGNORED`` at every BOS and at the EOS that closes it.

        Where one token is both, those inside the row say that a document ends, and are kept.
        The EOS that closes a row mostly cuts a document. Learning it would teach that text ends at ``seq_len``, which
        costs the last token of every full window; the EOS of documents that end inside rows is learnt.
        """
        labels = row.copy()
        if self.bos is not None and self.bos == self.eos:
            labels[0] = IGNORED
        elif self.bos is not None:
            labels[row == self.bos] = IGNORED
        if self.eos is not None:
            labels[-1] = IGNORED
        return labels

    def _pieces(self, unit: int, first: int, last: int) -> list[NDArray[np.int64]]:
        """What places ``first`` to ``last`` of the stream hold of a document and of the separator after it."""
        document, begin = self._document_order[unit], int(self._begins[unit])
        start, length = int(self.documents.starts[document]), int(self.documents.lengths[document])
        low, high = max(0, first - begin), last - begin
        text = self.documents.tokens[start + min(low, length) : start + min(high, length)].astype(np.int64)
        return [text, self._separator[max(0, low - length) : max(0, high - length)]]

    def _enter(self, epoch: int) -> None:
        """Lays out the stream of an epoch; the one asked for last is kept."""
        if epoch == self._epoch:
            return
        count, drawn = len(self.documents), {"seed": self.seed, "epoch": epoch}
        self._document_order = epoch_permutation(count, **drawn, stream=0) if self.shuffle else np.arange(count)
        self._row_order = epoch_permutation(len(self), **drawn, stream=1) if self.shuffle else np.arange(len(self))
        sizes = self.documents.lengths[self._document_order] + len(self._separator)
        self._begins = np.cumsum(sizes) - sizes  # place in the stream where each document begins
        self._epoch = epoch


def excerpts(documents: Documents, count: int, length: int, *, bos: int | None, seed: int = 0) -> NDArray[np.int64]:
    """Cuts ``count`` excerpts of ``length`` tokens that do not overlap, [count, length] int64.

    One from each document as far as the documents reach, which documents and where drawn from ``seed``; if there are
    fewer documents than excerpts, the longest give further ones. An excerpt lies in one document and begins with BOS if
    there is one.

    Raises:
        ValueError: If the documents do not hold that many.
    """
    body = length - (bos is not None)
    if count < 1 or body < 1:
        raise ValueError(f"Excerpts need a count of at least 1 and a length of at least 2, got {count} and {length}.")
    rng = np.random.default_rng([seed, length])
    places = documents.lengths // body  # how many fit in each
    if places.sum() < count:
        raise ValueError(
            f"{count} excerpts of {length} tokens were asked for, but the {len(documents)} documents hold only"
            f" {int(places.sum())}: the longest has {int(documents.lengths.max(initial=0))} tokens."
            " Ask for fewer or shorter excerpts, or give longer documents."
        )
    rows = []
    for document, share in enumerate(_shares(documents.lengths, places, body, count, rng)):
        slack = int(documents.lengths[document]) - share * body
        gaps = np.sort(rng.integers(0, slack + 1, share)) if share else np.empty(0, np.int64)
        starts = documents.starts[document] + gaps + body * np.arange(share)
        rows += [documents.tokens[start : start + body].astype(np.int64) for start in starts]
    table = np.stack(rows)
    return table if bos is None else np.insert(table, 0, bos, axis=1)


def _shares(
    lengths: NDArray[np.int64], places: NDArray[np.int64], body: int, count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """How many excerpts each document gives, [documents] int64."""
    shares = np.zeros(len(lengths), np.int64)
    long_enough = np.flatnonzero(places)
    shares[rng.permutation(long_enough)[:count]] = 1
    for _ in range(count - int(shares.sum())):
        left = np.where(shares < places, lengths - shares * body, -1)
        shares[left.argmax()] += 1
    return shares
