"""Rows to batches: a dataset, a sampler that shards it over ranks, and a loader that resumes with the very next row.

Lightning saves ``state_dict()`` of a training loader in every checkpoint and calls ``load_state_dict()`` before the
first batch of a resumed run; a plain ``DataLoader`` has neither and starts its epoch again. A ``DistributedSampler``
(which ``RowSampler`` is) it leaves alone, apart from calling ``set_epoch`` before every epoch.
"""

import random
from collections.abc import Iterator
from typing import Any, Protocol, cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_longrope.packing import IGNORED, PackedRows

FILLING = -1
"""Index of a row that fills the last batch of a rank: no label, no weight."""


class ExtraRows(Protocol):
    """Makes the rows that are mixed between those of the text."""

    def __call__(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        """A row, [seq_len] int64, and the weight of predicting each of its tokens, [seq_len] float32."""


class RowDataset(Dataset[dict[str, Tensor]]):
    """Batches' rows by (epoch, index): a pure function, so workers, ranks and resumed runs agree.

    Gives ``input_ids`` [seq_len] int64, ``labels`` [seq_len] int64 (not shifted) and, if there are extra rows,
    ``weights`` [seq_len] float32. A plain integer is an index of epoch 0.
    """

    def __init__(self, rows: PackedRows, extra: ExtraRows | None = None) -> None:
        self.rows = rows
        self.extra = extra

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        number = self.rows.number(epoch, max(0, index))
        weights = torch.ones(self.rows.seq_len)
        if self.extra is not None and number >= self.rows.text_rows:
            tokens, weights = self.extra(random.Random(f"{self.rows.seed}/{epoch}/{number - self.rows.text_rows}"))
            row = tokens.numpy()
        else:
            row = self.rows.row(epoch, number)
        labels = self.rows.labels(row) if index != FILLING else np.full_like(row, IGNORED)
        item = {"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(labels)}
        return item if self.extra is None else {**item, "weights": weights}


class RowSampler(DistributedSampler[tuple[int, int]]):
    """(epoch, index) of this rank's rows: every ``num_replicas``-th, from row ``start`` of the epoch on.

    The ranks share out an epoch's rows without overlap and have equally many. Training leaves out the remainder that
    does not divide (fewer rows than ranks; another order every epoch); evaluation keeps every row and adds rows without
    labels.

    Args:
        dataset: The rows.
        num_replicas: Ranks that see different rows.
        rank: This one's number among them.
        drop_last: True in training.
    """

    def __init__(self, dataset: RowDataset, num_replicas: int = 1, rank: int = 0, drop_last: bool = True) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False, drop_last=drop_last)
        self.num_samples = (len(dataset) if drop_last else len(dataset) + num_replicas - 1) // num_replicas
        self.total_size = self.num_samples * num_replicas
        self.start = 0
        if not self.num_samples:
            raise ValueError(
                f"{len(dataset)} rows cannot be shared by {num_replicas} ranks: give more text, or shorter rows."
            )

    def __iter__(self) -> Iterator[Any]:
        rows = len(cast("RowDataset", self.dataset))
        # equally many for every rank, from wherever we start
        end = rows - (rows - self.start) % self.num_replicas if self.drop_last else self.total_size
        for index in range(self.start + self.rank, end, self.num_replicas):
            yield self.epoch, index if index < rows else FILLING


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A ``DataLoader`` over a ``RowSampler`` that knows how many rows of its epoch are done, and can go on from there.

    The count is of rows over all ranks, so a run may go on with another batch size or number of ranks.
    ``len`` stays that of the whole epoch, as Lightning's progress expects.
    """

    _epoch, _rows = 0, 0  # the epoch begun last and its rows handed out
    _resume: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches of an epoch; it is chosen when the first one is taken, since Lightning sets it after ``iter``."""
        sampler = self.sampler
        if not isinstance(sampler, RowSampler):  # Lightning put its own there, to overfit some batches
            yield from super().__iter__()
            return
        resume, self._resume = self._resume, None
        self._epoch, self._rows = sampler.epoch, 0
        if resume is not None and resume["epoch"] == sampler.epoch:
            self._rows = resume["rows"]
        sampler.start = self._rows
        for batch in super().__iter__():
            self._rows += len(batch["input_ids"]) * sampler.num_replicas
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, rows done and what the order of the rows depends on."""
        if self._resume is not None:
            return dict(self._resume)
        return {"epoch": self._epoch, "rows": self._rows, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the rows of ``state_dict``; with other data the epoch begins anew, and a warning says so."""
        if state_dict["order"] != self._order():
            rank_zero_warn(
                f"The checkpoint was cut in other rows ({state_dict['order']}, now {self._order()}):"
                " the epoch begins with its first row."
            )
            return
        self._resume = dict(state_dict)

    def _order(self) -> dict[str, int]:
        rows = cast("RowDataset", self.dataset).rows
        return {"seed": rows.seed, "seq_len": rows.seq_len, "rows": len(rows), "tokens": rows.documents.total}
