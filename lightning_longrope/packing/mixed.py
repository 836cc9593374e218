"""Policy ``mixed``: rows of short documents for the original window between rows of the full window (LongRoPE2).

Mixed context window training (arXiv:2502.20082, section 3.3) keeps what the model could do at its original window: the
short rows are trained with the original RoPE and every document by itself, the long rows with the rescaled RoPE and
full attention over documents joined to the whole window.

Every row has ``seq_len`` tokens, so all cost alike: a short row holds many documents, or pieces, of at most
``short_seq_len`` tokens (policy ``best_fit``), a long row is one of policy ``concat``. The shortest documents make the
short rows, up to the share of the text that is asked for, and the longest the long rows; so every token is read once an
epoch, long documents stay whole, and cuts are few.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_longrope.packing.best_fit import BestFitRows
from lightning_longrope.packing.concat import ConcatRows
from lightning_longrope.packing.documents import Documents, epoch_permutation
from lightning_longrope.packing.rows import Order, Row, Rows

LONG, SHORT = "long", "short"


class MixedRows(Rows[None]):
    """Rows of policy ``mixed``: long ones first, short ones behind them, in places and numbers.

    Args:
        documents: The tokenised documents.
        short_seq_len: Tokens of the longest document, or piece, of a short row.
        short_share: Share of the text that makes short rows, in (0, 1).
        options: See ``Rows``; extra rows are long ones.

    Raises:
        ValueError: Too, if either kind of row would be missing.
    """

    policy = "mixed"

    def __init__(self, documents: Documents, *, short_seq_len: int, short_share: float, **options: Any) -> None:
        if not 0 < short_share < 1:
            raise ValueError(f"`short_share` must be above 0 and below 1, got {short_share}.")
        if not 4 <= short_seq_len < options["seq_len"]:
            raise ValueError(
                f"`short_seq_len` must be at least 4 and below `seq_len` {options['seq_len']}, got {short_seq_len}."
            )
        self.short_seq_len, self.short_share = short_seq_len, short_share
        self._options = {name: value for name, value in options.items() if name != "order"}
        super().__init__(documents, **options)
        self.long.extra_rows = self.extra_rows

    @override
    def _count(self) -> int:
        short, long = self._split()
        if not len(short) or not len(long):
            raise ValueError(
                f"`short_share` {self.short_share} of the text of {len(self.documents)} documents leaves no document"
                f" for {'long' if len(short) else 'short'} rows: give more text or another share."
            )
        options = {**self._options, "extra_share": 0.0}
        self.long = ConcatRows(self.documents.select(long), **options, **self._ordered(long))
        self.short = BestFitRows(
            self.documents.select(short), longest=self.short_seq_len, **options, **self._ordered(short)
        )
        for name in ("tail", "padding", "cuts"):
            setattr(self, name, getattr(self.long, name) + getattr(self.short, name))
        return self.long.text_rows + self.short.text_rows

    def _split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of the documents of short and of long rows, each in increasing order."""
        lengths = self.documents.lengths
        read = np.ones(len(lengths)) if self._order is None else self._order.multiplicities
        tokens = lengths * read
        mixed = epoch_permutation(len(lengths), seed=self.seed, epoch=0, stream=4)  # so that ties are drawn
        by_length = mixed[np.argsort(lengths[mixed], kind="stable")]
        held = np.cumsum(tokens[by_length])
        count = int(np.searchsorted(held, self.short_share * held[-1], "right"))
        short, long = np.sort(by_length[:count]), np.sort(by_length[count:])
        return short[read[short] > 0], long[read[long] > 0]

    def _ordered(self, members: NDArray[np.int64]) -> dict[str, Any]:
        """``order`` of a part of the documents."""
        return {} if self._order is None else {"order": OrderOfPart(self._order, members)}

    @property
    @override
    def sections(self) -> dict[str, int]:
        return {LONG: len(self.long), SHORT: len(self.short)}

    @property
    @override
    def identity(self) -> dict[str, Any]:
        return {**super().identity, **self.sections, "short_seq_len": self.short_seq_len}

    @override
    def number(self, epoch: int, place: int) -> int:
        if place >= len(self.long):
            return self.long.text_rows + self.short.number(epoch, place - len(self.long))
        number = self.long.number(epoch, place)
        return number if number < self.long.text_rows else number + self.short.text_rows

    @override
    def row(self, epoch: int, number: int) -> Row:
        if number < self.long.text_rows:
            return self.long.row(epoch, number)
        return replace(self.short.row(epoch, number - self.long.text_rows), short=True)

    @override
    def enter(self, epoch: int) -> None:
        self.long.enter(epoch)
        self.short.enter(epoch)

    @override
    def _lay_out(self, epoch: int) -> None:
        raise NotImplementedError("the two parts lay themselves out")

    @override
    def _cut(self, layout: None, number: int) -> Row:
        raise NotImplementedError("the two parts cut themselves")


@dataclass(frozen=True)
class OrderOfPart:
    """An order as far as it is of some documents, by their numbers among those; an ``Order`` too.

    Attributes:
        whole: The order.
        members: Numbers of the documents, increasing, [M] int64.
    """

    whole: Order
    members: NDArray[np.int64]

    @property
    def multiplicities(self) -> NDArray[np.float64]:
        """How often an epoch reads each of the documents, on average, [M]."""
        return self.whole.multiplicities[self.members]

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Numbers of the epoch's documents among ``members``."""
        numbers = np.asarray(self.whole.order(epoch))
        places = np.minimum(np.searchsorted(self.members, numbers), len(self.members) - 1)
        return places[self.members[places] == numbers]

    def least(self, sizes: NDArray[np.int64]) -> int:
        """No epoch reads documents of ``members`` of a smaller size together, [M] int64 being the size of each."""
        return self.whole.least(self._spread(sizes))

    def next_epoch(self, epoch: int, wanted: NDArray[np.bool_]) -> int | None:
        """The first epoch from ``epoch`` on that reads one of ``members`` that is ``wanted``, [M]."""
        return self.whole.next_epoch(epoch, self._spread(wanted))

    def _spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of the documents among those of all, where the others have 0."""
        spread = np.zeros(len(self.whole.multiplicities), values.dtype)
        spread[self.members] = values
        return spread
