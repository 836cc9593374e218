"""A factor search on a model: an algorithm proposes, ``evaluating`` scores, the journal remembers.

Works without a trainer (``search_factors``); ``callbacks.FactorSearch`` runs the same loop on the trainer's ranks.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_longrope.evaluating import Evaluator, Race, SingleWorker, Workers
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.fingerprints import model_digest, tokenizer_digest
from lightning_longrope.model import evaluating
from lightning_longrope.objectives import (
    Objective,
    ObjectiveName,
    named_objective,
    search_documents,
)
from lightning_longrope.scoring import Score, document_values, means
from lightning_longrope.search import (
    Candidate,
    RampSearch,
    RecoverySearch,
    SearchAlgorithm,
    SearchResult,
    SearchSpace,
)
from lightning_longrope.search.judgement import HeldOut, judge
from lightning_longrope.search.schedule import DocumentSchedule, Stages
from lightning_longrope.search_folder import SearchFolder, SearchRun
from lightning_longrope.search_task import SearchTask, search_task, starting_point

log = logging.getLogger(__name__)


def search_factors(
    model: Any,
    documents: Sequence[Tensor],
    target_length: int,
    *,
    tokenizer: Any = None,
    algorithm: SearchAlgorithm | None = None,
    objective: Objective | ObjectiveName | None = None,
    max_evaluations: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    pinned: int | None = None,
    start_tokens: tuple[int, ...] | None = None,
    space: SearchSpace | Mapping[str, Any] | None = None,
    multiply: bool | None = None,
    recovery: bool = False,
    held_out: Sequence[Tensor] | int = 0,
    race: float | None = None,
    schedule: Stages | None = None,
    folder: str | Path | None = None,
    caches: Sequence[str | Path] = (),
    batch_tokens: int | None = None,
    workers: Workers | None = None,
    progress: Callable[[SearchRun], None] | None = None,
) -> SearchResult:
    """Searches the rescale factors with which a model reads ``target_length`` tokens best. Installs nothing.

    Leaves no trace on the model: factors, mode and random state are as before, also after an error.

    Args:
        model: A Hugging Face causal language model with rotary position embeddings.
        documents: Texts to judge on, 1-D int64 tensors of at least ``target_length`` tokens.
        target_length: Window to reach, in tokens; longer than the model's own.
        tokenizer: Tokenizer of the model; with it the objective asks for pass keys too.
        algorithm: What proposes the candidates; by default ``RampSearch``, in a recovery ``RecoverySearch``.
        objective: ``perplexity`` (mean nll of text tokens), ``needle`` (mean nll of answer tokens to questions about
            hidden pass keys), ``mixed`` (both, from one forward pass; see ``Objective``), or an ``Objective`` of
            yours. By default ``mixed`` with a tokenizer and ``perplexity`` without: plain perplexity does not see
            retrieval, and often ends without it.
        max_evaluations: Most candidates to score; the algorithm's own number by default.
        patience: End after so many candidates without a better one; None goes on to the budget.
        seed: Of the candidates and the pass keys.
        pinned: Number of fastest frequency pairs held at 1, which protects retrieval; an eighth of them, 4 at most,
            by default.
        start_tokens: Allowed numbers of first tokens that keep their pretrained angles. Only 0 by default: small models
            gain nothing from others, and Hugging Face cannot express them.
        space: Further arguments of the ``SearchSpace``, or a whole one; ``warm_start`` may be a file of factors.
        multiply: Whether candidates multiply the factors installed on the model, as a second extension does; by default
            where there are some and the target is longer than theirs.
        recovery: Search a table for short texts: the target may lie within the model's own window. Factors reach those
            installed with ``RecoverySearch``, and 1.25 times target over own window, at least 1.25, with the other
            algorithms. Candidates keep the installed attention factor, unless ``space`` has ``attention_factors``.
        held_out: Texts that only the judgement at the end sees, or how many of ``documents`` to keep back for it.
        race: Drop a candidate as soon as it is behind the last of those that matter for the next generation by more
            than this many standard errors of the differences on the same documents. None scores all on all documents.
        schedule: Pairs of a share of the evaluations and the number of documents that candidates are judged on so far;
            afterwards all. At each step the best are scored on the documents added. All from the start by default.
        folder: Where ``history.jsonl``, ``held_out.jsonl``, ``state.json``, ``factors.json`` and
            ``rescale_factors.csv`` go. A search that was cut continues there exactly.
        caches: ``history.jsonl`` of other searches of this model, whose scores on the same documents are used.
        batch_tokens: Tokens per forward pass; rows of different candidates share one. 16,384, on a CPU 2,048.
        workers: The processes that share the work; one by default.
        progress: Called whenever candidates are finished.

    Returns:
        The best factors with their score, in nats per token.

    Raises:
        ValueError: If the target is not longer than the model's window, a document is too short, an objective
            lacks its tokenizer, ``folder`` holds another search or one is at work there, a held-out document is one of
            the search's, memory suffices for no candidate, ``schedule`` does not grow towards all documents, or
            ``algorithm`` does not search the ``start_tokens`` given.
    """
    algorithm = algorithm or (RecoverySearch() if recovery and starting_point(model) else RampSearch())
    if len(set(start_tokens or ())) > 1 and not algorithm.searches_start_tokens:
        raise ValueError(
            f"`start_tokens` allows {tuple(start_tokens or ())}, and {type(algorithm).__name__} searches none: give one"
            " number, or take EvolutionSearch."
        )
    task = search_task(
        model,
        target_length,
        pinned=pinned,
        start_tokens=start_tokens,
        space=space,
        multiply=multiply,
        recovery=recovery,
        between=isinstance(algorithm, RecoverySearch),
    )
    objective = named_objective(objective, tokenizer)
    texts, judged = _kept_back(documents, held_out)
    rows = search_documents(texts, target_length, objective, tokenizer, seed)
    unseen = search_documents(judged, target_length, objective, tokenizer, seed + 1) if judged else []
    _check_disjoint(texts, judged, target_length)
    algorithm = algorithm.start(task.space, seed, max_evaluations, patience)
    workers = workers or SingleWorker()
    with _undisturbed(model), ExitStack() as until_the_end:
        identity = {"model": model_digest(model), "tokenizer": tokenizer_digest(tokenizer)}
        stages = DocumentSchedule.of(schedule, len(rows), algorithm.limit)
        settings = {"objective": objective.settings, "race": race, **algorithm.fingerprint}
        if stages.stages:
            settings["schedule"] = stages.stages
        if task.base is not None:
            settings["base"] = task.base.to_dict()
        files = SearchFolder(Path(folder) if folder else None, caches, workers, identity, until_the_end)
        evaluator = partial(Evaluator, model, objective=objective, batch_tokens=batch_tokens, workers=workers)
        scorer = evaluator(rows, book=files.book("history.jsonl", rows, settings))
        search = _Search(task, algorithm, scorer, race, stages, progress)
        best = search.run_to_end(files)
        result = _result(task, search, best)
        if unseen:
            judging = evaluator(unseen, book=files.book("held_out.jsonl", unseen, {}))
            result.held_out = _judge(task, result.factors, judging)
        files.save(search.run, search.algorithm.space, search.evaluator, result)
    return result


class _Search:
    """The loop of ask, score and tell."""

    def __init__(
        self,
        task: SearchTask,
        algorithm: SearchAlgorithm,
        evaluator: Evaluator,
        race: float | None,
        schedule: DocumentSchedule,
        progress: Callable[[SearchRun], None] | None,
    ) -> None:
        self.task, self.algorithm, self.evaluator = task, algorithm, evaluator
        self.race, self.schedule, self.progress = race, schedule, progress
        self.run = SearchRun(limit=algorithm.limit)
        self._complete: list[Score] = []  # of all documents in use, best first
        self._fresh, self._spent = 0, 0.0

    def run_to_end(self, files: SearchFolder) -> Any:
        """Baselines, then generation after generation; the best candidate."""
        self._use_documents()
        while candidates := self._ask():
            tables = [self.task.table(candidate) for candidate in candidates]
            scores = self._scores(tables, [candidate.origin for candidate in candidates], self.algorithm.generation)
            self.algorithm.tell(candidates, [score.value for score in scores])
            self._tally(scores)
            self._use_documents()
            files.save(self.run, self.algorithm.space, self.evaluator)
            self._show()
        best, score = self.algorithm.best
        if not math.isfinite(score):
            raise ValueError(
                f"None of the {self.run.evaluations} candidates gave a finite loss: check the model's precision."
            )
        return best

    def _ask(self) -> list[Candidate]:
        """The next generation. A search that ends before its last stage goes on to it first."""
        if not (candidates := self.algorithm.ask()) and self.evaluator.used < len(self.evaluator.documents):
            self._use_documents(len(self.evaluator.documents))
            candidates = self.algorithm.ask()
        return candidates

    def _use_documents(self, count: int | None = None) -> None:
        """Scores baselines and survivors on the documents that the schedule adds now, if it does."""
        algorithm, total = self.algorithm, len(self.evaluator.documents)
        count = count or self.schedule.documents(algorithm.evaluations, algorithm.limit, total)
        if count == self.run.documents:
            return
        self.run.documents = self.evaluator.used = count
        survivors = algorithm.survivors
        tables = [*self.task.baselines.values(), *map(self.task.table, survivors)]
        origins = [*(f"baseline:{name}" for name in self.task.baselines), *(one.origin for one in survivors)]
        scores = self._scores(tables, origins, algorithm.generation - 1, counted=False)
        names = list(self.task.baselines)
        self.run.baselines = {name: score.value for name, score in zip(names, scores, strict=False)}
        if survivors:
            algorithm.renew([score.value for score in scores[len(names) :]])
            self._complete = []
            self._keep_complete(scores[len(names) :])
            self.run.best = algorithm.best[1]

    def _scores(
        self, tables: list[RescaleFactors], origins: list[str], generation: int, counted: bool = True
    ) -> list[Score]:
        begin, before = time.perf_counter(), self.run.evaluations
        known = self.evaluator.recalled

        def finished(count: int) -> None:
            self.run.evaluations = before + count * counted
            self._show()

        scores = self.evaluator.scores(tables, origins, generation, self._reference() if counted else None, finished)
        fresh = len(tables) - (self.evaluator.recalled - known)
        self.run.cached += (len(tables) - fresh) * counted
        self._fresh, self._spent = self._fresh + fresh, self._spent + (time.perf_counter() - begin) * bool(fresh)
        self.run.seconds = self._spent / max(self._fresh, 1)
        self.run.forwards = self.evaluator.forwards
        return scores

    def _reference(self) -> Race | None:
        """The worst candidate that still matters, to race against."""
        kept = self.algorithm.kept
        if self.race is None or len(self._complete) < kept:
            return None
        worst = self._complete[kept - 1]
        sums = torch.tensor(worst.documents[: self.evaluator.used], dtype=torch.float64)
        values = document_values(sums, self.evaluator.objective)
        return Race(self.race, worst.value, values)

    def _tally(self, scores: list[Score]) -> None:
        run, finite = self.run, [score.value for score in scores if math.isfinite(score.value)]
        run.generation, run.evaluations = self.algorithm.generation, self.algorithm.evaluations
        run.dropped += sum(score.status == "dropped" for score in scores)
        run.failed += sum(score.status in ("nan", "inf", "oom") for score in scores)
        run.best, run.median = self.algorithm.best[1], statistics.median(finite) if finite else math.nan
        self._keep_complete(scores)

    def _keep_complete(self, scores: list[Score]) -> None:
        complete = [*self._complete, *(score for score in scores if score.status in ("ok", "partial"))]
        self._complete = sorted(complete, key=lambda score: score.value)[: self.algorithm.kept]

    def _show(self) -> None:
        if self.progress:
            self.progress(self.run)


def _kept_back(documents: Sequence[Tensor], held_out: Sequence[Tensor] | int) -> tuple[list[Tensor], list[Tensor]]:
    """The documents of the search and those of the judgement."""
    if not isinstance(held_out, int):
        judged = list(held_out)
    elif 0 <= held_out < max(len(documents), 1):
        judged = list(documents[len(documents) - held_out :])
        documents = documents[: len(documents) - held_out]
    else:
        raise ValueError(f"`held_out` keeps back {held_out} of {len(documents)} documents: none is left to search on.")
    if len(judged) == 1:
        raise ValueError("`held_out` needs at least 2 documents, which say something about the spread, or none.")
    return list(documents), judged


def _check_disjoint(texts: Sequence[Tensor], judged: Sequence[Tensor], length: int) -> None:
    seen = {text[:length].cpu().numpy().tobytes() for text in texts}
    if any(text[:length].cpu().numpy().tobytes() in seen for text in judged):
        raise ValueError("A held-out document is one of the search's: a judgement needs documents of its own.")


def _result(task: SearchTask, search: _Search, best: Any) -> SearchResult:
    run, score = search.run, search.algorithm.best[1]
    better = {name: value for name, value in run.baselines.items() if value < score}
    if better:
        log.warning(
            "The best candidate scored %.4f nats, %s on the same documents: more evaluations may find a better one.",
            score,
            " and ".join(f"{name} {value:.4f}" for name, value in better.items()),
        )
    return SearchResult(
        task.table(best), score, run.evaluations, run.forwards, search.evaluator.history, dict(run.baselines)
    )


def _judge(task: SearchTask, winner: RescaleFactors, evaluator: Evaluator) -> HeldOut:
    """Winner and baselines on documents that the search has not seen; says so where the winner is within noise."""
    tables = {"searched": winner, **task.baselines}
    scores = evaluator.scores(list(tables.values()), [f"held_out:{name}" for name in tables])
    sums = {name: _array(score) for name, score in zip(tables, scores, strict=True)}

    def value(total: np.ndarray[Any, Any]) -> float:
        return evaluator.objective.value(*means(torch.from_numpy(total)))

    found = judge(sums.pop("searched"), sums, value)
    if found.within_noise:
        log.warning(
            "On %d held-out documents the factors found are not better than %s beyond noise: %+.4f nats, 95 %% interval"
            " %+.4f to %+.4f. More documents or evaluations may tell them apart.",
            found.documents,
            found.best_baseline,
            found.difference,
            found.difference_low,
            found.difference_high,
        )
    return found


def _array(score: Score) -> np.ndarray[Any, Any]:
    rows = [(math.nan,) * 4 if row is None else row for row in score.documents]
    return np.array(rows, dtype=np.float64)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode inside; modes and random state as they were afterwards."""
    device = next(model.parameters()).device
    with evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
