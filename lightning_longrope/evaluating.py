"""Scores candidates on the ranks that share a search, and forgets nothing that is finished.

The work is (candidate, document) pairs. Rows of one length share a forward pass, also those of different candidates
(see ``model.candidate_rows``). Every rank plans the same passes, which do not depend on the number of ranks or on
what an earlier run has done already; so a search gives the same numbers bit for bit on 1, 2 or 4 processes, and after
a cut. Passes are run in rounds, one pass a rank, and every rank learns the results of a round before the next:

    passes   0  1  2 | 3  4  5 | 6           3 ranks: rank 1 runs 1, 4 and, as dummy work, 6 again

Out of memory, a pass is halved, on all ranks alike. Shapes: C candidates, D documents.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_longrope.factors import RescaleFactors
from lightning_longrope.levers import LONG_PASS, TILE
from lightning_longrope.objectives import OBJECTIVES, Objective, ObjectiveName, SearchDocument
from lightning_longrope.out_of_memory import GoOnWithShapes, free_memory, gathers_weights, is_out_of_memory
from lightning_longrope.score_book import EARLIER, OOM, OWN, UNKNOWN, ScoreBook, plain_number
from lightning_longrope.scoring import Score, document_values, pass_tokens, row_sums, score_of
from lightning_longrope.sequence_parallel import sequence_group

Rows = list[tuple[int, int]]
"""Rows of one forward pass, as (candidate, document)."""

_BLOCKS = 4  # parts of the documents after each of which a race is judged
_LEAST = 3  # documents that say something about the spread of differences


class Workers(Protocol):
    """The processes that share a search. A sequence-parallel group, which runs one forward together, is one worker."""

    @property
    def rank(self) -> int:
        """Number of this worker."""

    @property
    def world_size(self) -> int:
        """Number of workers."""

    @property
    def writes(self) -> bool:
        """Whether this process keeps the files; true of exactly one."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a float64 tensor over all workers, each counted once, the same on every process."""


class SingleWorker:
    """One process, nothing to exchange."""

    rank = 0
    world_size = 1
    writes = True

    def sum(self, values: Tensor) -> Tensor:
        """Returns ``values`` as they are."""
        return values


class ProcessWorkers:
    """The processes of torch's default process group (``torchrun`` without a trainer)."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.writes = self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, on the CPU."""
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        total = values.to(device, copy=True)
        torch.distributed.all_reduce(total)
        return total.cpu()


@dataclass(frozen=True)
class Race:
    """Drops a candidate that is behind a reference on the same documents by more than noise.

    Attributes:
        z: Standard errors of the mean paired difference that count as more than noise.
        value: Score of the reference on all documents.
        documents: Its score on each document.
    """

    z: float
    value: float
    documents: Sequence[float]

    def lost(self, values: Sequence[float], members: Sequence[int]) -> float | None:
        """The extrapolated score of a candidate that is out, None for one that goes on.

        Args:
            values: Its score on each document so far.
            members: Which documents those are.
        """
        behind = np.array(values) - np.array([self.documents[index] for index in members])
        mean, error = behind.mean(), behind.std(ddof=1) / len(behind) ** 0.5
        return float(self.value + mean) if mean > self.z * error and mean > 0 else None


class Evaluator:
    """Scores candidates on documents, on all workers together.

    Args:
        model: A Hugging Face causal language model in eval mode.
        documents: Rows to score on.
        objective: Turns the sums of a candidate into one value.
        batch_tokens: Tokens of a forward pass; rows longer than that go alone. By default ``PASS_TOKENS``.
        workers: The processes that share the work.
        book: What is known already and where results are kept; on the process that ``writes`` only.

    Attributes:
        history: One mapping per evaluation, as in the journal.
        forwards: (candidate, document) pairs that this search has scored, those before a cut included.
        recalled: Candidates that needed no forward pass now.
        used: How many of the documents, the first ones, candidates are judged on.
    """

    def __init__(
        self,
        model: Any,
        documents: Sequence[SearchDocument],
        objective: Objective,
        *,
        batch_tokens: int | None = None,
        workers: Workers | None = None,
        book: ScoreBook | None = None,
    ) -> None:
        self.model = model
        self.documents = documents
        self.objective = objective
        self.batch_tokens = batch_tokens or pass_tokens(model.device)
        self.workers = workers or SingleWorker()
        self.book = book
        self.history: list[dict[str, Any]] = []
        self.forwards = 0
        self.recalled = 0
        self.used = len(documents)
        self._group = sequence_group(model)
        self._waited_for = self._group.size > 1 or (self.workers.world_size > 1 and gathers_weights(model))
        self._most_rows: int | None = None  # of a pass, once memory did not suffice for more

    def scores(
        self,
        tables: Sequence[RescaleFactors],
        origins: Sequence[str],
        generation: int = 0,
        race: Race | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """Scores in the order of ``tables``, the same on every process.

        Args:
            tables: Candidates, C.
            origins: Where each comes from, for people.
            generation: Number that the journal gets.
            race: Drops the hopeless before the last document.
            progress: Called after every round with the number of candidates finished.

        Raises:
            ValueError: If not one row of any candidate fits in memory.
        """
        batch = _Batch(self, tables, origins, generation)
        for members in _blocks(self.used, race):
            batch.score(members, race, progress)
        scores = batch.finish()
        self.history += batch.records
        self.forwards += batch.forwards
        self.recalled += batch.fresh.count(False)
        return scores

    def plan(self, pairs: Rows) -> Iterator[Rows]:
        """Passes of rows of one length and answer size."""
        shapes: dict[tuple[int, int], Rows] = {}
        for pair in pairs:
            document = self.documents[pair[1]]
            shapes.setdefault((len(document.tokens), document.answer), []).append(pair)
        for (length, _), rows in shapes.items():
            size = min(max(1, self.batch_tokens // length), self._most_rows or len(rows))
            yield from (rows[start : start + size] for start in range(0, len(rows), size))

    def round(self, passes: list[Rows], tables: Sequence[RescaleFactors]) -> list[Tensor | None]:
        """Runs one pass a rank, at most as many as there are ranks; the sums of each, None where memory ended."""
        mine = min(self.workers.rank, len(passes) - 1)  # beyond the last pass: dummy work, thrown away
        sums = self._attempt(passes[mine], tables)
        found = torch.zeros(len(passes), max(map(len, passes)), 5, dtype=torch.float64)
        if self.workers.rank == mine and sums is not None:
            found[mine, : len(sums), :4] = sums
            found[mine, :, 4] = 1
        found = self.workers.sum(found)
        results = [rows[: len(plan), :4] if rows[0, 4] else None for rows, plan in zip(found, passes, strict=True)]
        failed = [len(plan) for plan, result in zip(passes, results, strict=True) if result is None]
        if failed:
            self._most_rows = max(1, min(failed) // 2)
        return results

    def _attempt(self, rows: Rows, tables: Sequence[RescaleFactors]) -> Tensor | None:
        """Sums of a pass, [B, 4]; None where there is not enough memory for it."""
        shapes = GoOnWithShapes() if self._waited_for else nullcontext()
        try:
            with shapes:
                sums = row_sums(self.model, [tables[c] for c, _ in rows], [self.documents[d] for _, d in rows])
            failed = self._group.any(getattr(shapes, "failed", False), self.model.device)
            return None if failed else sums
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        free_memory()
        return None


class _Batch:
    """Candidates being scored together: what is known of each document, and who is still in."""

    def __init__(
        self, evaluator: Evaluator, tables: Sequence[RescaleFactors], origins: Sequence[str], generation: int
    ) -> None:
        self.evaluator, self.tables, self.origins, self.generation = evaluator, tables, origins, generation
        self.book, self.objective = evaluator.book, evaluator.objective
        shape = (len(tables), len(evaluator.documents))
        told = torch.zeros(*shape, 5, dtype=torch.float64) if self.book is None else self.book.recall(tables)
        told = evaluator.workers.sum(told)
        self.known, self.remembered = told[..., 4], told[..., :4]
        self.sums = torch.full((*shape, 4), torch.nan, dtype=torch.float64)
        self.scored = torch.zeros(shape, dtype=torch.bool)
        self.seconds = [0.0] * len(tables)
        self.written = [False] * len(tables)
        self.fresh = [False] * len(tables)
        self.forwards = 0
        nothing = score_of(self.sums[0], self.scored[0], self.objective)
        self.final: dict[int, Score] = {c: nothing for c in range(len(tables)) if OOM in self.known[c]}
        """Scores of candidates that are out or finished."""

    @property
    def records(self) -> list[dict[str, Any]]:
        """One mapping per candidate, as in the journal."""
        return [self._record(candidate) for candidate in range(len(self.tables))]

    def score(self, members: range, race: Race | None, progress: Callable[[int], None] | None) -> None:
        """Scores a block of documents of all who are still in."""
        pairs = [(c, d) for c in range(len(self.tables)) if c not in self.final for d in members]
        earlier = [pair for pair in pairs if self.known[pair] == EARLIER]
        for pair in earlier:
            self._keep(pair, self.remembered[pair])
        new = [pair for pair in pairs if self.known[pair] != EARLIER]
        self.forwards += len(new)
        # Planned as if nothing were known, so that a resumed search puts the same rows into a pass as an uncut one.
        queue = deque(self._unfinished(rows) for rows in self.evaluator.plan(new))
        self._settle(members, race)
        while queue:
            self._round(queue, members, race, progress)
        self._settle(members, race)

    def _unfinished(self, rows: Rows) -> Rows:
        """The rows of a pass without those of an earlier run, which are taken as they are."""
        for pair in rows:
            if self.known[pair] == OWN:
                self._keep(pair, self.remembered[pair])
        return [pair for pair in rows if self.known[pair] == UNKNOWN]

    def _round(
        self, queue: deque[Rows], members: range, race: Race | None, progress: Callable[[int], None] | None
    ) -> None:
        begin = time.perf_counter()
        passes: list[Rows] = []
        while queue and len(passes) < self.evaluator.workers.world_size:
            if rows := [pair for pair in queue.popleft() if pair[0] not in self.final]:
                passes.append(rows)
        if not passes:
            return
        found = self.evaluator.round(passes, self.tables)
        for rows, sums in reversed(list(zip(passes, found, strict=True))):
            if sums is not None:
                for pair, values in zip(rows, sums, strict=True):
                    self._keep(pair, values)
            elif len(rows) > 1:
                queue.extendleft([rows[len(rows) // 2 :], rows[: len(rows) // 2]])
            else:
                self.final[rows[0][0]] = score_of(self.sums[0], torch.zeros_like(self.scored[0]), self.objective)
        self._share_time(passes, time.perf_counter() - begin)
        if self.book is not None:
            self.book.keep_rows(
                (self.tables[c], d, self.sums[c, d].tolist()) for rows in passes for c, d in rows if self.scored[c, d]
            )
        self._settle(members, race)
        if progress is not None:
            progress(len(self.final))

    def _keep(self, pair: tuple[int, int], sums: Tensor) -> None:
        self.sums[pair], self.scored[pair] = sums, True

    def _share_time(self, passes: list[Rows], seconds: float) -> None:
        total = sum(map(len, passes))
        for candidate, _ in (pair for rows in passes for pair in rows):
            self.seconds[candidate] += seconds / total
            self.fresh[candidate] = True

    def _settle(self, members: range, race: Race | None) -> None:
        """Finishes candidates that have all documents of the block: at the end, after an overflow, or by the race."""
        for candidate in range(len(self.tables)):
            if candidate in self.final or not bool(self.scored[candidate, : members.stop].all()):
                continue
            score = score_of(self.sums[candidate], self.scored[candidate], self.objective)
            if members.stop < self.evaluator.used and score.status == "ok":
                assert race is not None
                values = document_values(self.sums[candidate, : members.stop], self.objective)
                if (lost := race.lost(values, range(members.stop))) is None:
                    continue
                score = replace(score, value=lost, status="dropped")
            elif members.stop < len(self.evaluator.documents) and score.status == "ok":
                score = replace(score, status="partial")
            self.final[candidate] = score
            self._write(candidate)

    def finish(self) -> list[Score]:
        """All scores; those that memory did not suffice for are written only now.

        Raises:
            ValueError: If it sufficed for none, which is no matter of the candidates.
        """
        scores = [self.final[candidate] for candidate in range(len(self.tables))]
        if all(score.status == "oom" for score in scores):
            length = len(self.evaluator.documents[0].tokens)
            tiles = f" tiled MLP (`model.init_args.memory.mlp_tile: {TILE}`)," if length <= LONG_PASS else ""
            raise ValueError(
                f"Out of memory in every candidate, with one row of {length} tokens in a forward pass. Next: half"
                f" precision (`trainer.precision: bf16-true`),{tiles}"
                " sequence parallel (`trainer.strategy.init_args.sequence_parallel_size`), weights sharded over more"
                " devices (FSDP2, DeepSpeed stage 3), or a shorter target_length."
            )
        for candidate in range(len(self.tables)):
            self._write(candidate)
        if self.book is not None:
            self.book.end_generation(self.tables, self.evaluator.used)
        return scores

    def _write(self, candidate: int) -> None:
        if self.book is not None and not self.written[candidate]:
            self.book.keep_evaluation(self._record(candidate))
            self.written[candidate] = True

    def _record(self, candidate: int) -> dict[str, Any]:
        table, score = self.tables[candidate], self.final[candidate]
        return {
            "evaluation": len(self.evaluator.history) + candidate,
            "generation": self.generation,
            "origin": self.origins[candidate],
            "values": list(table.values),
            "start_tokens": table.start_tokens,
            "attention_factor": table.attention_factor,
            "score": score.value,
            "status": score.status,
            "parts": {"text": score.text, "answer": score.answer},
            "documents": [None if row is None else [plain_number(number) for number in row] for row in score.documents],
            "seconds": round(self.seconds[candidate], 4),
        }


def _blocks(documents: int, race: Race | None) -> Iterator[range]:
    """The documents in parts, after each of which a race is judged; all at once without a race."""
    step = documents if race is None else max(_LEAST, -(-documents // _BLOCKS))
    for start in range(0, documents, step):
        yield range(start, min(start + step, documents))


def score_candidates(
    model: Any,
    candidates: Sequence[RescaleFactors],
    documents: Sequence[SearchDocument],
    objective: Objective | ObjectiveName,
    *,
    batch_tokens: int | None = None,
    workers: Workers | None = None,
) -> list[Score]:
    """Scores of candidates outside of a search; see ``Evaluator``."""
    if isinstance(objective, str):
        objective = OBJECTIVES[objective]
    evaluator = Evaluator(model, documents, objective, batch_tokens=batch_tokens, workers=workers)
    return evaluator.scores(candidates, [""] * len(candidates))
