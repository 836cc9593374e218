"""What all search algorithms share: ask, tell, the budget, the best, and a resume that is exact by replay.

An algorithm is one generator that reads as straight code: it yields a generation of candidates and gets their
scores back. The base class asks each candidate only once and answers repeats from memory, so an algorithm
need not care. Since everything follows from the seed and the scores, the scores are the whole state.
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from lightning_longrope.factors import RescaleFactors
from lightning_longrope.search.journal import check_fingerprint, strict_json
from lightning_longrope.search.judgement import HeldOut
from lightning_longrope.search.space import Candidate, SearchSpace

Generations = Generator[list[Candidate], list[float], None]

_TRIES = 64  # proposals for one new candidate; a space where so many repeat is as good as exhausted
_BARREN = 64  # generations in a row with nothing new, after which a search ends


@dataclass
class SearchResult:
    """What a search found.

    Args:
        factors: The best factors.
        score: Their score, lower is better.
        evaluations: Number of candidates scored.
        forwards: Number of (candidate, document) pairs scored, baselines included; several may share a forward pass.
        history: One mapping per evaluation, as in the journal.
        baselines: Scores of the published tables on the same documents, by name.
        held_out: Score on documents the search has not seen, beside the baselines; None where there were none.
    """

    factors: RescaleFactors
    score: float
    evaluations: int
    forwards: int
    history: list[dict[str, Any]] = field(default_factory=list)
    baselines: dict[str, float] = field(default_factory=dict)
    held_out: HeldOut | None = None


class SearchAlgorithm(ABC):
    """Proposes candidates and learns from their scores; lower is better.

    ::

        algorithm = RampSearch().start(space, seed=0)
        while candidates := algorithm.ask():
            algorithm.tell(candidates, [score(candidate) for candidate in candidates])
        candidate, score = algorithm.best

    A subclass writes ``_generations``, keeps what its ``__init__`` was given in public attributes of its own,
    and everything of the run in private ones: the public ones are the settings that a resume compares.
    A copy or a pickle holds the settings only and must be started again.
    """

    max_evaluations: int | None = None
    """Budget when ``start`` names none; None searches until the algorithm ends by itself."""

    @property
    def kept(self) -> int:
        """How many of the best candidates the next generation is made from; a race may drop what is worse."""
        return 16

    @property
    def searches_start_tokens(self) -> bool:
        """Whether candidates differ in start tokens where the space allows several; else all have the fewest."""
        return True

    @property
    def survivors(self) -> list[Candidate]:
        """The candidates that are scored again when there are more documents to judge on; the best first."""
        return self.ranked()[: self.kept]

    @abstractmethod
    def _generations(self) -> Generations:
        """Yields generations of candidates and receives the score of each, never NaN, infinite where it failed.

        Uses ``space``, ``rng``, ``limit``, ``ranked`` and ``_new``. Candidates that were scored before cost nothing.
        """

    def adapt(self, space: SearchSpace) -> SearchSpace:
        """The space as this algorithm searches it; by default as it is given."""
        return space

    def start(
        self, space: SearchSpace, seed: int = 0, max_evaluations: int | None = None, patience: int | None = None
    ) -> Self:
        """Begins a search, forgetting any earlier one.

        Args:
            space: What may be proposed.
            seed: Of all randomness; the same seed and scores give the same candidates.
            max_evaluations: Most candidates to score, the setting of the algorithm by default.
            patience: End after so many candidates without a better one; None goes on to the budget.

        Returns:
            The algorithm itself.
        """
        limit = self.max_evaluations if max_evaluations is None else max_evaluations
        if limit is not None and limit < 1:
            raise ValueError(f"`max_evaluations` must be at least 1, got {limit}.")
        if patience is not None and patience < 1:
            raise ValueError(f"`patience` must be at least 1, got {patience}.")
        self._space, self._seed, self._limit, self._patience = self.adapt(space), seed, limit, patience
        self._rng = np.random.default_rng(seed)
        self._scores: dict[Candidate, float] = {}
        self._number: dict[Candidate, int] = {}
        self._renewed = 0
        self._told: list[dict[str, Any]] = []
        self._reply: list[float] | None = None
        self._yielded: list[Candidate] = []
        self._stream = self._generations()
        self._pending: list[Candidate] | None = None
        self._count = 0
        return self

    @property
    def space(self) -> SearchSpace:
        """The space being searched."""
        return self._space

    @property
    def rng(self) -> np.random.Generator:
        """The one source of randomness of a subclass."""
        return self._rng

    @property
    def limit(self) -> int | None:
        """Most candidates this run scores."""
        return self._limit

    @property
    def generation(self) -> int:
        """Number of generations told, which is the index of the one that ``ask`` returns."""
        return len(self._told)

    @property
    def evaluations(self) -> int:
        """Number of candidates told."""
        return self._count

    @property
    def done(self) -> bool:
        """Whether there is nothing left to ask."""
        return not self.ask()

    @property
    def best(self) -> tuple[Candidate, float]:
        """The candidate with the lowest score so far, the earliest of equals, and that score."""
        ranked = self.ranked()
        if not ranked:
            raise ValueError("There is no best candidate before the first `tell`.")
        return ranked[0], self._scores[ranked[0]]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the candidates apart from the scores, as JSON values."""
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        run = {"seed": self._seed, "limit": self._limit, "patience": self._patience, "space": asdict(self._space)}
        return dict(strict_json({"algorithm": type(self).__name__, "settings": settings, **run}))

    def ask(self) -> list[Candidate]:
        """The generation to score now, without repeats; the same until it is told, empty at the end."""
        if not hasattr(self, "_pending"):
            raise ValueError(f"{type(self).__name__} has no search space yet: call `start(space, seed)` first.")
        if self._pending is None:
            self._pending = self._advance()
        return list(self._pending)

    def tell(self, candidates: Sequence[Candidate], scores: Sequence[float | None]) -> None:
        """Gives the scores of the generation that ``ask`` returned.

        Args:
            candidates: All of them, in any order.
            scores: One each, lower is better; None, NaN and infinities count as worse than any number.

        Raises:
            ValueError: If these are not the candidates asked for, or not one score each.
        """
        pending = self.ask()
        if len(candidates) != len(scores) or len(candidates) != len(pending) or set(candidates) != set(pending):
            raise ValueError(
                f"`tell` expected one score for each of the {len(pending)} candidates that `ask` returned,"
                f" got {len(candidates)} candidates and {len(scores)} scores."
            )
        worst_last = dict(zip(candidates, map(_number, scores), strict=True))
        told = [worst_last[candidate] for candidate in pending]
        self._told.append({"scores": strict_json(told), "crc": _checksum(pending)})
        self._scores.update(zip(pending, told, strict=True))
        self._number.update({candidate: self._count + index for index, candidate in enumerate(pending)})
        self._count += len(pending)
        self._reply = [self._scores.get(candidate, math.inf) for candidate in self._yielded]
        self._pending = None

    def renew(self, scores: Sequence[float | None]) -> None:
        """Gives the survivors new scores, on more documents; all others are forgotten, and asked again if need be.

        Call it between ``tell`` and ``ask``, so that no generation is made from scores that are out of date.

        Args:
            scores: One for each of ``survivors``, as in ``tell``.

        Raises:
            ValueError: If that is not one score each, or the next generation was asked for already.
        """
        survivors = self.survivors
        if len(scores) != len(survivors) or self._pending:
            raise ValueError(
                f"`renew` expected {len(survivors)} scores, one for each survivor, before the next `ask`;"
                f" got {len(scores)} {'after it' if self._pending else 'scores'}."
            )
        self._scores = dict(zip(survivors, map(_number, scores), strict=True))
        self._told[-1]["renewed"] = strict_json(list(self._scores.values()))
        self._renewed, self._pending = self._count, None

    def ranked(self) -> list[Candidate]:
        """All candidates told, best first, equals in the order they were asked."""
        return sorted(self._scores, key=self._scores.__getitem__)

    def state_dict(self) -> dict[str, Any]:
        """The search so far, as JSON values; a generation that was asked but not told is asked again."""
        return {"fingerprint": self.fingerprint, "generations": [dict(entry) for entry in self._told]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a search exactly, by telling its scores again. Call ``start`` with the same arguments before.

        Raises:
            ValueError: If the settings differ, or the same settings no longer give the same candidates.
        """
        check_fingerprint(state["fingerprint"], self.fingerprint, "The saved state")
        self.start(self._space, self._seed, self._limit, self._patience)
        for number, entry in enumerate(state["generations"]):
            candidates = self.ask()
            if _checksum(candidates) != entry["crc"]:
                raise ValueError(
                    f"The saved search cannot be continued: generation {number} now has other candidates"
                    " (another version of this package, numpy or cma). Start the search again."
                )
            self.tell(candidates, entry["scores"])
            if "renewed" in entry:
                self.renew(entry["renewed"])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _new(self, count: int, propose: Callable[[], Candidate], batch: Sequence[Candidate] = ()) -> list[Candidate]:
        """``batch`` and up to ``count`` more from ``propose``, none scored before and all different.

        Where proposals keep repeating, random points of the space stand in; fewer come back once those repeat too.
        """
        taken = dict.fromkeys(batch)
        for _ in range(count):
            for attempt in range(2 * _TRIES):
                candidate = propose() if attempt < _TRIES else self._anywhere()
                if candidate not in taken and candidate not in self._number:
                    taken[candidate] = None
                    break
            else:  # as good as exhausted
                break
        return list(taken)

    def _anywhere(self) -> Candidate:
        """A random candidate."""
        return self.space.random(self.rng)

    def _advance(self) -> list[Candidate]:
        """Runs the algorithm until it yields something new, which becomes the next generation."""
        for _ in range(_BARREN):
            left = math.inf if self._limit is None else self._limit - self.evaluations
            if left <= 0 or self._out_of_patience:
                break
            try:
                # a generation cut by the budget, not all of it scored, ended the search above
                self._yielded = next(self._stream) if self._reply is None else self._stream.send(self._reply)
            except StopIteration:
                break
            fresh = [candidate for candidate in dict.fromkeys(self._yielded) if candidate not in self._scores]
            if fresh:
                self._check(fresh)
                return fresh[: int(min(left, len(fresh)))]
            self._reply = [self._scores[candidate] for candidate in self._yielded]
        return []

    @property
    def _out_of_patience(self) -> bool:
        if self._patience is None or not self._scores:
            return False
        return self._count - max(self._renewed, self._number[self.ranked()[0]] + 1) >= self._patience

    def _check(self, candidates: list[Candidate]) -> None:
        for candidate in candidates:
            if not self.space.contains(candidate):
                raise ValueError(f"{type(self).__name__} proposed a candidate outside of its space: {candidate}.")


def _number(score: float | None) -> float:
    return float(score) if score is not None and math.isfinite(score) else math.inf


def _checksum(candidates: list[Candidate]) -> int:
    return zlib.crc32(repr([(c.values, c.start_tokens, c.attention_factor) for c in candidates]).encode())
