"""Rows to batches: a dataset, a sampler that shards it over ranks, and a loader that resumes with the very next row.

Lightning saves ``state_dict()`` of a training loader in every checkpoint and calls ``load_state_dict()`` before the
first batch of a resumed run; a plain ``DataLoader`` has neither and starts its epoch again. A ``DistributedSampler``
(which ``RowSampler`` is) it leaves alone, apart from calling ``set_epoch`` before every epoch.

Shapes: B rows of a batch, S tokens of a row, K stretches of tokens in a batch that must not see each other.
"""

import random
from collections.abc import Iterator
from typing import Any, Protocol, cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data.distributed import DistributedSampler

from lightning_longrope.packing import IGNORED, Row, Rows, bookended_labels

FILLING = -1
"""Place of a row that fills the last batch of a rank: no label, no weight."""


STACKED = ("input_ids", "labels", "weights")


class ExtraRows(Protocol):
    """Makes the rows that are mixed between those of the text."""

    def __call__(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        """A row, [seq_len] int64, and the weight of predicting each of its tokens, [seq_len] float32."""


class RowDataset(Dataset[dict[str, Any]]):
    """Batches' rows by (epoch, place): a pure function, so workers, ranks and resumed runs agree.

    Gives ``input_ids`` [S] int64 and ``labels`` [S] int64 (not shifted); if there are extra rows, ``weights`` [S]
    float32; where documents are isolated, ``bounds`` of them (see ``Row``); under policy ``mixed``, ``original_rope``,
    whether the row wants the model's original RoPE; and for who measures, ``stretch_lengths`` (``Row.stretches``), of
    numpy and so on the CPU. A plain integer is a place of epoch 0.
    """

    def __init__(self, rows: Rows[Any], extra: ExtraRows | None = None) -> None:
        self.rows = rows
        self.extra = extra

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, place = key if isinstance(key, tuple) else (0, key)
        row, weights = self.row(epoch, max(0, place))
        labels = row.labels if place != FILLING else np.full_like(row.labels, IGNORED)
        item: dict[str, Any] = {"input_ids": torch.from_numpy(row.tokens), "labels": torch.from_numpy(labels)}
        item["stretch_lengths"] = row.stretches
        if self.extra is not None:
            item["weights"] = weights
        if row.isolated:
            item["bounds"] = torch.from_numpy(row.bounds)
        return {**item, "original_rope": row.short} if self.rows.policy == "mixed" else item

    def row(self, epoch: int, place: int) -> tuple[Row, Tensor]:
        """The row at a place of an epoch and the weight of predicting each of its tokens, [S] float32."""
        number = self.rows.number(epoch, place)
        if self.extra is None or number < self.rows.text_rows:
            return self.rows.row(epoch, number), torch.ones(self.rows.seq_len)
        tokens, weights = self.extra(random.Random(f"{self.rows.seed}/{epoch}/{number - self.rows.text_rows}"))
        return self._extra_row(tokens.numpy()), weights

    def _extra_row(self, tokens: Any) -> Row:
        labels = bookended_labels(tokens, self.rows.bos, self.rows.eos)
        return Row(tokens, labels, np.zeros(1, np.int64), isolated=self.rows.isolated)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of rows of one kind.

    In the place of ``bounds`` it has what the attention of isolated documents needs: ``position_ids`` [B, S] int64 that
    begin again with every document, ``cu_seq_lens`` [K + 1] int32, the bounds in the batch's rows laid end to end, and
    ``max_length``, tokens of the longest stretch. ``original_rope`` is one bool, ``stretch_lengths`` are joined.
    """
    batch = {name: default_collate([item[name] for item in items]) for name in STACKED if name in items[0]}
    batch["stretch_lengths"] = np.concatenate([item["stretch_lengths"] for item in items])
    if "original_rope" in items[0]:
        batch["original_rope"] = items[0]["original_rope"]
    if "bounds" not in items[0]:
        return batch
    rows, length = batch["input_ids"].shape
    begins = torch.cat([item["bounds"][:-1] + length * row for row, item in enumerate(items)])
    sizes = torch.diff(begins, append=torch.tensor([rows * length]))
    positions = torch.arange(rows * length) - begins.repeat_interleave(sizes)
    bounds = torch.cat([begins, torch.tensor([rows * length])])
    return {
        **batch,
        "position_ids": positions.view(rows, length),
        "cu_seq_lens": bounds.int(),
        "max_length": int(sizes.max()),
    }


class RowSampler(DistributedSampler[tuple[int, int]]):
    """(epoch, place) of this rank's rows: every ``num_replicas``-th, from the rows of the epoch that are done on.

    The ranks share out an epoch's rows without overlap and have equally many. Training leaves out the remainder that
    does not divide (fewer rows than ranks; another order every epoch); evaluation keeps every row and adds rows without
    labels.

    Where there are rows of several kinds, all ranks read one kind at a time, a batch each, and the kind that is least
    far gets the next turn. So a batch holds one kind, the kinds stay mixed over the epoch, and with any number of ranks
    it depends only on how many of each are done which rows come next. What does not fill a batch of every rank is left
    out.

    Args:
        dataset: The rows.
        num_replicas: Ranks that see different rows.
        rank: This one's number among them.
        drop_last: True in training.
        batch_size: Rows of a batch on one rank.
    """

    def __init__(
        self, dataset: RowDataset, num_replicas: int = 1, rank: int = 0, drop_last: bool = True, batch_size: int = 1
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False, drop_last=drop_last)
        self.sizes = list(dataset.rows.sections.values())
        self.done = [0] * len(self.sizes)
        self.turn = num_replicas * (batch_size if len(self.sizes) > 1 else 1)  # rows that all ranks read at a time
        self.total_size = sum(self._ends())
        self.num_samples = self.total_size // num_replicas
        if not self.num_samples:
            counts = ", ".join(f"{size} {kind} rows" for kind, size in dataset.rows.sections.items())
            raise ValueError(f"{counts} cannot be shared by {num_replicas} ranks: give more text, or shorter rows.")

    def __iter__(self) -> Iterator[Any]:
        done = list(self.done)
        while (section := self.next_section(done)) is not None:
            before, size = sum(self.sizes[:section]), self.sizes[section]
            for index in range(done[section] + self.rank, done[section] + self.turn, self.num_replicas):
                yield self.epoch, before + index if index < size else FILLING
            done[section] += self.turn

    def next_section(self, done: list[int]) -> int | None:
        """Kind of the next rows where so many of each kind are done; None at the end of the epoch."""
        ends = self._ends()
        left = [section for section, end in enumerate(ends) if done[section] < end]
        return min(left, key=lambda section: done[section] / self.sizes[section], default=None)

    def _ends(self) -> list[int]:
        """Rows of each kind that are read, equally many for every rank from wherever we start."""
        excess = [(size - done) % self.turn for size, done in zip(self.sizes, self.done, strict=True)]
        if self.drop_last:
            return [size - over for size, over in zip(self.sizes, excess, strict=True)]
        return [size + -over % self.turn for size, over in zip(self.sizes, excess, strict=True)]


class ResumableLoader(DataLoader[dict[str, Any]]):
    """A ``DataLoader`` over a ``RowSampler`` that knows how many rows of its epoch are done, and can go on from there.

    The counts are of rows over all ranks, one for each kind of row, so a run may go on with another batch size or
    number of ranks. ``len`` stays that of the whole epoch, as Lightning's progress expects.
    """

    _epoch = 0  # the epoch begun last, and its rows handed out
    _rows: list[int] | None = None
    _resume: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches of an epoch; it is chosen when the first one is taken, since Lightning sets it after ``iter``."""
        sampler = self.sampler
        if not isinstance(sampler, RowSampler):  # Lightning put its own there, to overfit some batches
            yield from super().__iter__()
            return
        resume, self._resume = self._resume, None
        done = [0] * len(sampler.sizes)
        if resume is not None and resume["epoch"] == sampler.epoch:
            done = list(resume["rows"])
        self._epoch, self._rows, sampler.done = sampler.epoch, list(done), list(done)
        cast("RowDataset", self.dataset).rows.enter(sampler.epoch)
        for batch in super().__iter__():
            section = sampler.next_section(done)
            assert section is not None, "more batches than rows"
            done[section] += len(batch["input_ids"]) * sampler.num_replicas
            self._rows = list(done)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, rows done and what the order of the rows depends on."""
        if self._resume is not None:
            return dict(self._resume)
        return {"epoch": self._epoch, "rows": self._rows or [0] * len(self._sections), "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the rows of ``state_dict``; with other data the epoch begins anew, and a warning says so."""
        if state_dict["order"] != self._order():
            rank_zero_warn(
                f"The checkpoint was cut in other rows ({state_dict['order']}, now {self._order()}):"
                " the epoch begins with its first row."
            )
            return
        self._resume = dict(state_dict)

    @property
    def _sections(self) -> dict[str, int]:
        return cast("RowDataset", self.dataset).rows.sections

    def _order(self) -> dict[str, Any]:
        return cast("RowDataset", self.dataset).rows.identity
