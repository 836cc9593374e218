"""What a search knows of scores: those of its own journal, of an earlier run of it, and of other searches.

Scores are kept as the sums of each (candidate, document) pair, so they can be judged again in any way, and serve every
search of the same model on the same document, whatever its algorithm, seed and objective.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_longrope.factors import RescaleFactors
from lightning_longrope.reading import blaming
from lightning_longrope.search.journal import Journal, check_fingerprint, read_journal

UNKNOWN, OWN, EARLIER, OOM = range(4)
"""Where a pair is known from: nowhere; the run of this search that was cut; before this generation; it does not fit."""

Key = tuple[tuple[float, ...], int, float]
Known = dict[Key, dict[int, list[float]]]

_ROWS_EVERY = 1.0  # seconds between writes of single pairs


class ScoreBook:
    """Remembers pairs, and writes what is new to a folder; used by the one process that writes.

    ``history.jsonl`` gets a line when a candidate is finished, and another when it is scored on more documents.
    ``history.rows.jsonl`` gets single pairs of candidates that are not, at most every second, and goes away at the end
    of a generation: at long windows a pair takes minutes.

    Args:
        path: The journal (``history.jsonl``); None to keep nothing.
        fingerprint: What names the search; ``model`` and ``document_digests`` in it name what a pair's sums depend on.
        caches: Journals of other searches whose pairs may be used.

    Raises:
        ValueError: If the journal is that of another search, or a cache is of another model or of other documents.
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, Any], caches: Sequence[str | Path] = ()) -> None:
        self._rows_path = None if path is None else path.with_suffix(".rows.jsonl")
        self._fingerprint = fingerprint
        self._own: Known = {}
        self._earlier: Known = {}
        self._no_memory: set[Key] = set()
        self._pending: list[dict[str, Any]] = []
        self._wrote = time.monotonic()
        self._rows: Journal | None = None
        self._journal: Journal | None = None
        for cache in caches:
            self._draw_on(Path(cache))
        if path is not None:
            self._journal = Journal(path, fingerprint)
            with blaming(f"`{path}` holds a line that is no evaluation"):
                self._read_own(self._journal)

    def recall(self, tables: Sequence[RescaleFactors]) -> Tensor:
        """What is known of candidates, [C, D, 5] float64: four sums and where they are from."""
        told = torch.zeros(len(tables), len(self._fingerprint["document_digests"]), 5, dtype=torch.float64)
        for number, table in enumerate(tables):
            key = _key(table)
            for source, known in ((OWN, self._own), (EARLIER, self._earlier)):
                for document, sums in known.get(key, {}).items():
                    told[number, document] = torch.tensor([*sums, source], dtype=torch.float64)
            if key in self._no_memory:
                told[number, :, 4] = OOM
        return told

    def keep_rows(self, rows: Iterable[tuple[RescaleFactors, int, list[float]]]) -> None:
        """Takes note of scored pairs: candidate, document, sums."""
        if self._rows_path is None:
            return
        self._pending += [
            {**_fields(table), "score": None, "document": document, "sums": [plain_number(number) for number in sums]}
            for table, document, sums in rows
        ]
        if time.monotonic() - self._wrote >= _ROWS_EVERY:
            self._rows = self._rows or Journal(self._rows_path, self._fingerprint)
            self._rows.append(self._pending)
            self._pending, self._wrote = [], time.monotonic()

    def keep_evaluation(self, record: Mapping[str, Any]) -> None:
        """Writes a finished candidate, unless the journal has it on as many documents."""
        if self._journal is not None and not self._has(record, _scored(record)):
            self._journal.append([record])
            self._pending = [row for row in self._pending if _record_key(row) != _record_key(record)]
        self._remember(self._own, record)

    def end_generation(self, tables: Sequence[RescaleFactors], documents: int) -> None:
        """All these candidates are finished on the first ``documents``: from now on they are known from before."""
        for key in map(_key, tables):
            own = self._own.get(key, {})
            self._earlier.setdefault(key, {}).update({place: own[place] for place in own if place < documents})
        self._pending = []
        # A resumed search passes finished generations first, and needs the single pairs for the one that was cut.
        journal, rows = self._journal, self._rows
        if journal is not None and rows is not None and all(self._has(row, {row["document"]}) for row in rows.records):
            rows.path.unlink()
            self._rows = None

    def _has(self, record: Mapping[str, Any], documents: set[int]) -> bool:
        """Whether the journal has a candidate on these documents, or knows that none fits in memory."""
        written = self._journal.find(record) if self._journal is not None else None
        return written is not None and (written["status"] == "oom" or documents <= _scored(written))

    def _read_own(self, journal: Journal) -> None:
        for record in journal.records:
            self._remember(self._own, record)
        if self._rows_path is not None and self._rows_path.exists():
            self._rows = Journal(self._rows_path, self._fingerprint)
            for record in self._rows.records:
                self._own.setdefault(_record_key(record), {})[record["document"]] = [*map(float, record["sums"])]

    def _draw_on(self, path: Path) -> None:
        """Pairs of another search on documents that this one has too."""
        theirs, records = read_journal(path)
        check_fingerprint({"model": theirs.get("model")}, {"model": self._fingerprint["model"]}, f"The cache `{path}`")
        ours = {digest: index for index, digest in enumerate(self._fingerprint["document_digests"])}
        places = [ours.get(digest) for digest in theirs.get("document_digests", ())]
        if all(place is None for place in places):
            raise ValueError(f"The cache `{path}` has no document of this search: leave it out.")
        with blaming(f"The cache `{path}` holds a line that is no evaluation"):
            for record in records:
                self._remember(self._earlier, record, places)

    def _remember(self, known: Known, record: Mapping[str, Any], places: Sequence[int | None] | None = None) -> None:
        """Takes a journal line in; ``places`` says which document of ours each of its documents is."""
        if record["status"] == "oom":
            if places is None:
                self._no_memory.add(_record_key(record))
            return
        rows = known.setdefault(_record_key(record), {})
        for index, sums in enumerate(record["documents"]):
            place = index if places is None else places[index]
            if sums is not None and place is not None:
                rows[place] = [float(number) for number in sums]


def _scored(record: Mapping[str, Any]) -> set[int]:
    """The documents that a candidate was scored on."""
    return {place for place, sums in enumerate(record["documents"]) if sums is not None}


def plain_number(number: float) -> float | str:
    """A number as strict JSON can hold it: ``nan`` and ``inf`` as text, which ``float`` reads back."""
    return number if math.isfinite(number) else str(number)


def _key(table: RescaleFactors) -> Key:
    return table.values, table.start_tokens, table.attention_factor


def _record_key(record: Mapping[str, Any]) -> Key:
    return tuple(record["values"]), record["start_tokens"], record["attention_factor"]


def _fields(table: RescaleFactors) -> dict[str, Any]:
    return {
        "values": list(table.values),
        "start_tokens": table.start_tokens,
        "attention_factor": table.attention_factor,
    }
