"""The folder of a search: its journals, how it stands, and what it found; where it stands, for those who watch it."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_longrope.evaluating import Evaluator, Workers
from lightning_longrope.files import write_json
from lightning_longrope.fingerprints import document_digests, joint_digest
from lightning_longrope.locks import hold
from lightning_longrope.objectives import SearchDocument, objective_name
from lightning_longrope.score_book import ScoreBook
from lightning_longrope.search import SearchResult, SearchSpace
from lightning_longrope.search.journal import strict_json


@dataclass
class SearchRun:
    """Where a running search stands, for progress bars and loggers.

    Attributes:
        generation: Generations finished.
        evaluations: Candidates scored, those found in journals included.
        limit: Most evaluations, None if the algorithm ends by itself.
        cached: How many of them came from journals.
        dropped: How many of them a race dropped.
        failed: How many of them overflowed or did not fit in memory.
        forwards: (candidate, document) pairs scored, baselines included.
        best: Lowest score so far in nats.
        median: Median score of the last generation in nats.
        documents: How many documents candidates are judged on now.
        seconds: Time of a fresh evaluation, mean so far; 0 before the first.
        baselines: Scores of the published tables on the same documents.
    """

    generation: int = 0
    evaluations: int = 0
    limit: int | None = None
    cached: int = 0
    dropped: int = 0
    failed: int = 0
    forwards: int = 0
    best: float = math.inf
    median: float = math.nan
    documents: int = 0
    seconds: float = 0.0
    baselines: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float | None:
        """Seconds until the budget is spent, if it is known and something was timed."""
        if self.limit is None or not self.seconds:
            return None
        return (self.limit - self.evaluations) * self.seconds

    def metrics(self) -> dict[str, float]:
        """What loggers get after each generation."""
        names = ("evaluations", "cached", "dropped", "failed", "forwards", "best", "median", "seconds")
        return {**{name: float(getattr(self, name)) for name in names}, **self.baselines}


class SearchFolder:
    """The folder of a search, which one process writes, and no other search meanwhile."""

    def __init__(
        self,
        folder: Path | None,
        caches: Sequence[str | Path],
        workers: Workers,
        identity: dict[str, Any],
        until_the_end: ExitStack,
    ) -> None:
        self.folder, self.caches, self.workers, self.identity = folder, caches, workers, identity
        self._until_the_end, self._held = until_the_end, False
        self._fingerprint: dict[str, Any] = {}

    def book(self, name: str, rows: list[SearchDocument], settings: dict[str, Any]) -> ScoreBook | None:
        """Opens a journal where files are written; refused there, it is refused on every process.

        Args:
            name: Its file.
            rows: The documents that its scores are of.
            settings: What else a resume must find unchanged.

        Raises:
            ValueError: If the folder holds another search, another process is at work there, or a file is damaged.
        """
        digests, book, refusal = document_digests(rows), None, None
        each = {"documents": joint_digest(digests), **settings, "document_digests": digests}
        fingerprint = {**self.identity, **each}
        self._fingerprint = self._fingerprint or fingerprint
        if self.workers.writes:
            try:
                self._hold()
                path = self.folder / name if self.folder else None
                book = ScoreBook(path, fingerprint, self.caches if settings else ())
            except ValueError as error:
                refusal = error
        if self.workers.sum(torch.tensor([float(refusal is not None and self.workers.writes)])).item():
            raise refusal or ValueError("The first process refused the search folder or a cache; see its message.")
        return book

    def _hold(self) -> None:
        """Keeps other searches out of the folder, until this one ends."""
        if self.folder is not None and not self._held:
            folder = self.folder.resolve()
            self._until_the_end.enter_context(hold(folder.with_name(f".{folder.name}.lock"), self.folder))
            self._held = True

    def save(
        self, run: SearchRun, space: SearchSpace, evaluator: Evaluator, result: SearchResult | None = None
    ) -> None:
        """Writes ``state.json`` and, with the result at the end, the factors."""
        if self.folder is None or not self.workers.writes:
            return
        if result is not None:
            result.factors.save(self.folder / "factors.json")
            result.factors.save_csv(self.folder / "rescale_factors.csv")
        names = ("rotary_size", "base", "original_length", "target_length", "max_factor", "pinned", "attention_factor")
        state = {
            **asdict(run),
            "finished": result is not None,
            "objective": objective_name(evaluator.objective),
            "documents": len(evaluator.documents),
            **{name: getattr(space, name) for name in names},
            "held_out": asdict(result.held_out) if result and result.held_out else None,
            "fingerprint": self._fingerprint,
        }
        write_json(self.folder / "state.json", strict_json(state))
