"""What the packing policies share: a row is a pure function of (seed, epoch, seq_len, policy, number).

Rows are cut out of the flat token file when they are asked for, so another window needs no second tokenising and
resuming is arithmetic. What a policy knows of an epoch, its layout, is made once and kept until another epoch is
asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightning_longrope.packing.documents import Documents, epoch_permutation

IGNORED = -100
"""Label of a token that is not to be predicted."""


class Order(Protocol):
    """Which of D documents an epoch reads, where it does not read each of them once; ``Mixture`` is one."""

    @property
    def multiplicities(self) -> NDArray[np.float64]:
        """How often an epoch reads each document, on average, [D]; 0 for one that no epoch reads."""

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Document numbers of an epoch, repeats allowed; a pure function of the epoch."""

    def least(self, sizes: NDArray[np.int64]) -> int:
        """No epoch reads documents of a smaller size together, [D] int64 being the size of each."""

    def next_epoch(self, epoch: int, wanted: NDArray[np.bool_]) -> int | None:
        """The first epoch from ``epoch`` on that reads one of the documents ``wanted``, [D]; None if none ever does."""


Layout = TypeVar("Layout")


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        tokens: [seq_len] int64.
        labels: The tokens, not shifted, with ``IGNORED`` where none is to be predicted, [seq_len] int64. The first
            token of a document is never predicted, so no label crosses from one document to another.
        starts: Where each document, or piece of one, begins in the row, [k] int64; increasing, the first is 0.
        padding: Tokens at the end of the row that belong to no document.
        isolated: Whether its documents must not see each other.
        short: Whether it is a row of short documents that the model reads with its original RoPE.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    starts: NDArray[np.int64]
    padding: int = 0
    isolated: bool = False
    short: bool = False

    @property
    def bounds(self) -> NDArray[np.int64]:
        """Bounds of the stretches that must not see each other, padding among them, [k + 1 or 2] int64."""
        return np.unique([*self.starts, len(self.tokens) - self.padding, len(self.tokens)])

    @property
    def stretches(self) -> NDArray[np.int64]:
        """Tokens of each stretch whose tokens see each other, without padding, [k or 1] int64."""
        filled = len(self.tokens) - self.padding
        return np.diff(np.append(self.starts, filled)) if self.isolated else np.array([filled])


def joined(pieces: Iterable[NDArray[Any]], size: int) -> NDArray[np.int64]:
    """Pieces of unsigned tokens one after another, [size] int64; each is read and widened once."""
    row, end = np.empty(size, np.int64), 0
    for piece in pieces:
        row[end : end + len(piece)] = piece
        end += len(piece)
    assert end == size, f"the pieces of a row hold {end} of {size} tokens"
    return row


def bookended_labels(tokens: NDArray[np.int64], bos: int | None, eos: int | None) -> NDArray[np.int64]:
    """Labels of a row between bookends: the row itself, with ``IGNORED`` at every BOS and at the EOS that closes it.

    Where one token is both, those inside the row say that a document ends, and are kept.
    The EOS that closes a row mostly cuts a document. Learning it would teach that text ends at ``seq_len``, which
    costs the last token of every full window; the EOS of documents that end inside rows is learnt.
    """
    labels = tokens.copy()
    if bos is not None and bos == eos:
        labels[0] = IGNORED
    elif bos is not None:
        labels[tokens == bos] = IGNORED
    if eos is not None:
        labels[-1] = IGNORED
    return labels


class Rows(ABC, Generic[Layout]):
    """The rows one policy makes of the documents of a split.

    An epoch has ``len(rows)`` places. ``number(epoch, place)`` says which row is there, ``row(epoch, number)`` cuts it.

    Attributes:
        text_rows: Rows of text in every epoch; numbers from here on are extra rows, which the caller makes.
        extra_rows: Those.
        tail: Text tokens (and separators) of an epoch that are in no row.
        padding: Tokens of an epoch's rows that are padding.
        cuts: Places of an epoch where a document is cut and goes on in another row; not counted under ``concat``, which
            cuts at the end of nearly every row.

    Args:
        documents: The tokenised documents.
        seq_len: Tokens of a row, markers included; at least 4.
        bos: Token that opens a document or row, or None if the tokenizer has none.
        eos: Token that closes a document or row, or None if the tokenizer has none.
        seed: Of the orders of documents and rows.
        shuffle: False keeps the documents and rows in their order in every epoch.
        extra_share: Share of all rows, in [0, 1), that the caller makes in another way: they get places among ours and
            the numbers from ``text_rows`` on.
        order: Which documents an epoch reads, where that is not each of them once.

    Raises:
        ValueError: If ``seq_len`` is below 4, ``extra_share`` is out of range or the documents do not fill one row.
    """

    policy: str
    isolated: bool = False
    """Whether the documents of a row must not see each other."""
    tail: int = 0
    padding: int = 0
    cuts: int = 0

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
        order: Order | None = None,
    ) -> None:
        if seq_len < 4:
            raise ValueError(f"`seq_len` must be at least 4 (BOS, two tokens of text, EOS), got {seq_len}.")
        if not 0 <= extra_share < 1:
            raise ValueError(f"`extra_share` must be at least 0 and below 1, got {extra_share}.")
        self.documents, self.seq_len, self.seed, self.shuffle = documents, seq_len, seed, shuffle
        self.bos, self.eos = bos, eos
        self._head = np.array([bos] if bos is not None else [], np.int64)
        self._foot = np.array([eos] if eos is not None else [], np.int64)
        self._order = order
        self.order_tokens = documents.total if order is None else order.least(documents.lengths)
        self._entered: tuple[int, NDArray[Any], Layout] | None = None
        self.text_rows = self._count()
        self.extra_rows = round(self.text_rows * extra_share / (1 - extra_share))

    @abstractmethod
    def _count(self) -> int:
        """Rows of text in every epoch.

        Raises:
            ValueError: If there is none.
        """

    @abstractmethod
    def _lay_out(self, epoch: int) -> Layout:
        """What the rows of an epoch are cut from."""

    @abstractmethod
    def _cut(self, layout: Layout, number: int) -> Row:
        """Row ``number`` of an epoch."""

    def __len__(self) -> int:
        return self.text_rows + self.extra_rows

    @property
    def sections(self) -> dict[str, int]:
        """Places of an epoch by kind of row, in the order of the places: one kind, but for policy ``mixed``."""
        return {self.policy: len(self)}

    @property
    def identity(self) -> dict[str, Any]:
        """All that a place of a row in an epoch depends on, as far as a checkpoint can tell."""
        return {
            "policy": self.policy,
            "isolated": self.isolated,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "rows": len(self),
            "tokens": self.order_tokens,
        }

    def number(self, epoch: int, place: int) -> int:
        """Number of the row at a place of an epoch: below ``text_rows`` one of ours, from there on an extra."""
        return int(self._layout(epoch)[0][place])

    def row(self, epoch: int, number: int) -> Row:
        """Row ``number`` of an epoch."""
        if not 0 <= number < self.text_rows:
            raise IndexError(f"row {number} of {self.text_rows}")
        row = self._cut(self._layout(epoch)[1], number)
        assert len(row.tokens) == self.seq_len, f"row {number} has {len(row.tokens)} tokens"
        return row

    def enter(self, epoch: int) -> None:
        """Lays out an epoch now; processes forked afterwards share the layout instead of each making its own."""
        self._layout(epoch)

    def _layout(self, epoch: int) -> tuple[NDArray[Any], Layout]:
        """Order of the rows and layout of an epoch; the one asked for last is kept."""
        if self._entered is None or self._entered[0] != epoch:
            self._entered = None  # free its memory first
            self._entered = epoch, self._shuffled(len(self), epoch, stream=1), self._lay_out(epoch)
        return self._entered[1:]

    def _document_order(self, epoch: int) -> NDArray[Any]:
        """Numbers of the epoch's documents, an unsigned integer type."""
        if self._order is None:
            return self._shuffled(len(self.documents), epoch, stream=0)
        return _compact(np.asarray(self._order.order(epoch)), len(self.documents))

    def _usable_order(self, epoch: int, usable: NDArray[np.bool_] | None = None) -> NDArray[Any]:
        """The epoch's documents that are ``usable``, [D], in its order; all where that is None.

        Of an epoch without any, those of the next that has some; empty only if none ever has.
        """
        order = self._document_order(epoch)
        order = order if usable is None else order[usable[order]]
        if len(order) or self._order is None:
            return order
        wanted = np.ones(len(self.documents), bool) if usable is None else usable
        later = self._order.next_epoch(epoch, wanted)
        return order if later is None else self._usable_order(later, usable)

    @property
    def _read_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document that is read in any epoch."""
        lengths = self.documents.lengths
        return lengths if self._order is None else lengths[self._order.multiplicities > 0]

    def _shuffled(self, size: int, epoch: int, stream: int) -> NDArray[Any]:
        if not self.shuffle:
            return np.arange(size, dtype=np.uint32 if size <= 1 << 32 else np.uint64)
        return _compact(epoch_permutation(size, seed=self.seed, epoch=epoch, stream=stream), size)

    def __getstate__(self) -> dict[str, Any]:
        """Goes to spawned processes without the layout, which they make again."""
        return {**self.__dict__, "_entered": None}


def _compact(numbers: NDArray[np.int64], size: int) -> NDArray[Any]:
    """Numbers below ``size`` in half the memory where that is possible."""
    return numbers.astype(np.uint32 if size <= 1 << 32 else np.uint64)
