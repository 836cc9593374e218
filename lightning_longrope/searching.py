"""A factor search on a model: an algorithm proposes, ``scoring`` scores, the journal remembers.

Works without a trainer (``search_factors``); ``callbacks.FactorSearch`` runs the same loop on the trainer's ranks.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_longrope.factors import RescaleFactors
from lightning_longrope.files import write_json
from lightning_longrope.model import rope_geometry
from lightning_longrope.scoring import (
    Objective,
    Score,
    SearchDocument,
    SingleWorker,
    Workers,
    score_candidates,
    search_documents,
)
from lightning_longrope.search import Candidate, Journal, RampSearch, SearchAlgorithm, SearchResult, SearchSpace
from lightning_longrope.search.journal import strict_json

BASELINES = ("linear", "ntk", "yarn")


@dataclass
class SearchRun:
    """Where a running search stands, for progress bars and loggers.

    Attributes:
        generation: Generations finished.
        evaluations: Candidates scored, those found in the journal included.
        limit: Most evaluations, None if the algorithm ends by itself.
        cached: How many of them came from the journal.
        forwards: Document-forwards of all evaluations and baselines.
        best: Lowest score so far in nats.
        baselines: Scores of PI ("linear"), NTK and YaRN on the same documents.
    """

    generation: int = 0
    evaluations: int = 0
    limit: int | None = None
    cached: int = 0
    forwards: int = 0
    best: float = math.inf
    baselines: dict[str, float] = field(default_factory=dict)


def search_factors(
    model: Any,
    documents: Sequence[Tensor],
    target_length: int,
    *,
    tokenizer: Any = None,
    algorithm: SearchAlgorithm | None = None,
    objective: Objective | None = None,
    max_evaluations: int | None = None,
    seed: int = 0,
    pinned: int | None = None,
    start_tokens: tuple[int, ...] = (0,),
    space: SearchSpace | None = None,
    folder: str | Path | None = None,
    batch_tokens: int = 16384,
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
        algorithm: What proposes the candidates; ``RampSearch`` by default.
        objective: ``perplexity`` (mean nll of text tokens), ``needle`` (mean nll of answer tokens to questions about
            hidden pass keys), ``mixed`` (the sum of both, from one forward pass). By default ``mixed`` with a tokenizer
            and ``perplexity`` without: plain perplexity does not see retrieval, and often ends without it.
        max_evaluations: Most candidates to score; the algorithm's own number by default.
        seed: Of the candidates and the pass keys.
        pinned: Number of fastest frequency pairs held at 1, which protects retrieval; an eighth of them, 4 at most,
            by default.
        start_tokens: Allowed numbers of first tokens that keep their pretrained angles. Only 0 by default: small models
            gain nothing from others, and Hugging Face cannot express them.
        space: The search space, instead of one of ``pinned`` and ``start_tokens``.
        folder: Where ``history.jsonl``, ``state.json``, ``factors.json`` and ``rescale_factors.csv`` go. A search
            that was cut continues there exactly.
        batch_tokens: Tokens per forward pass; rows of different candidates share one.
        workers: The processes that share the work; one by default.
        progress: Called after each generation.

    Returns:
        The best factors with their score, in nats per token.

    Raises:
        ValueError: If the target is not longer than the model's window, a document is too short, an objective
            lacks its tokenizer, or ``folder`` holds another search.
    """
    geometry = rope_geometry(model.config)
    if space is None:
        if target_length <= geometry.original_length:
            raise ValueError(
                f"`target_length` ({target_length}) must be longer than the model's own window"
                f" ({geometry.original_length} tokens)."
            )
        shape = {name: getattr(geometry, name) for name in ("rotary_size", "base", "original_length")}
        pinned = min(4, geometry.pairs // 8) if pinned is None else pinned
        space = SearchSpace(**shape, target_length=target_length, pinned=pinned, start_tokens=start_tokens)
    objective = objective or ("perplexity" if tokenizer is None else "mixed")
    rows = search_documents(documents, target_length, objective, tokenizer, seed)
    algorithm = (algorithm or RampSearch()).start(space, seed, max_evaluations)
    evaluator = _Evaluator(model, rows, objective, batch_tokens, workers or SingleWorker())
    evaluator.open(Path(folder) if folder else None, algorithm)
    with _undisturbed(model):
        return _search(algorithm, evaluator, progress)


def _search(
    algorithm: SearchAlgorithm, evaluator: "_Evaluator", progress: Callable[[SearchRun], None] | None
) -> SearchResult:
    space, run = algorithm.space, SearchRun(limit=algorithm.limit)
    baselines = _baselines(space)
    scores = evaluator.scores(list(baselines.values()), space, -1, run)
    run.baselines = dict(zip(baselines, (score.value for score in scores), strict=True))
    while candidates := algorithm.ask():
        scores = evaluator.scores(candidates, space, algorithm.generation, run)
        algorithm.tell(candidates, [score.value for score in scores])
        run.generation, run.evaluations = algorithm.generation, algorithm.evaluations
        run.best = algorithm.best[1]
        evaluator.save_state(space, run, finished=False)
        if progress:
            progress(run)
    best, score = algorithm.best
    if not math.isfinite(score):
        raise ValueError(f"None of the {run.evaluations} candidates gave a finite loss: check the model's precision.")
    result = SearchResult(best.to_factors(space), score, run.evaluations, run.forwards, evaluator.history)
    evaluator.save_state(space, run, finished=True, factors=result.factors)
    return result


def _baselines(space: SearchSpace) -> dict[str, Candidate]:
    """PI, NTK and YaRN as published, off the grid and with their own attention factors."""
    lengths = {name: getattr(space, name) for name in ("rotary_size", "base", "original_length", "target_length")}
    tables = {name: getattr(RescaleFactors, name)(**lengths) for name in BASELINES}
    return {
        name: Candidate(table.values, table.start_tokens, table.attention_factor, f"baseline:{name}")
        for name, table in tables.items()
    }


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode inside; mode and random state as they were afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(enabled=True):
            yield
    finally:
        model.train(training)


class _Evaluator:
    """Scores candidates once: from the journal where it has them, else on the model."""

    def __init__(
        self, model: Any, rows: list[SearchDocument], objective: Objective, batch_tokens: int, workers: Workers
    ) -> None:
        self.model = model
        self.rows = rows
        self.objective: Objective = objective
        self.batch_tokens = batch_tokens
        self.workers = workers
        self.history: list[dict[str, Any]] = []
        self._journal: Journal | None = None
        self._folder: Path | None = None
        self._fingerprint: dict[str, Any] = {}

    def open(self, folder: Path | None, algorithm: SearchAlgorithm) -> None:
        """Opens the journal on rank 0, which alone touches files."""
        self._fingerprint = {
            **algorithm.fingerprint,
            "objective": self.objective,
            "documents": _digest([(row.tokens.tolist(), row.answer, row.counted.tolist()) for row in self.rows]),
            "model": model_digest(self.model),
        }
        if folder is not None and self.workers.rank == 0:
            self._folder = folder
            self._journal = Journal(folder / "history.jsonl", self._fingerprint)

    def scores(self, candidates: list[Candidate], space: SearchSpace, generation: int, run: SearchRun) -> list[Score]:
        """Scores in the order of ``candidates``, the same on every rank."""
        begin = time.perf_counter()
        found = self._remembered(candidates)
        new = [candidate for candidate, score in zip(candidates, found, strict=True) if score is None]
        fresh = iter(
            score_candidates(
                self.model,
                [candidate.to_factors(space) for candidate in new],
                self.rows,
                self.objective,
                batch_tokens=self.batch_tokens,
                workers=self.workers,
            )
            if new
            else []
        )
        scores = [score or next(fresh) for score in found]
        seconds = (time.perf_counter() - begin) / max(1, len(new))
        records = [
            _record(candidate, score, generation, len(self.history) + index, 0.0 if old else seconds)
            for index, (candidate, score, old) in enumerate(zip(candidates, scores, found, strict=True))
        ]
        self.history += records
        if self._journal is not None:
            self._journal.append(record for record, old in zip(records, found, strict=True) if old is None)
        run.forwards += len(candidates) * len(self.rows)
        run.cached += len(candidates) - len(new)
        return scores

    def _remembered(self, candidates: list[Candidate]) -> list[Score | None]:
        """What rank 0 finds in its journal, known to all ranks."""
        table = torch.zeros(len(candidates), 4, dtype=torch.float64)  # known, value, text, answer
        for index, candidate in enumerate(candidates):
            record = self._journal.cached(candidate) if self._journal is not None else None
            if record is not None:
                values = (record["score"], record["parts"]["text"], record["parts"]["answer"])
                table[index] = torch.tensor([1.0, *(math.nan if v is None else v for v in values)], dtype=table.dtype)
        rows = self.workers.sum(table).tolist()
        return [Score(*row[1:]) if row[0] else None for row in rows]

    def save_state(
        self, space: SearchSpace, run: SearchRun, *, finished: bool, factors: RescaleFactors | None = None
    ) -> None:
        """Writes ``state.json`` and, at the end, the factors."""
        if self._folder is None:
            return
        if factors is not None:
            factors.save(self._folder / "factors.json")
            factors.save_csv(self._folder / "rescale_factors.csv")
        state = {**asdict(run), "finished": finished, "objective": self.objective, "documents": len(self.rows)}
        names = ("original_length", "target_length", "rotary_size", "base", "pinned")
        state |= {name: getattr(space, name) for name in names}
        write_json(self._folder / "state.json", strict_json({**state, "fingerprint": self._fingerprint}))


def _record(candidate: Candidate, score: Score, generation: int, number: int, seconds: float) -> dict[str, Any]:
    return {
        "evaluation": number,
        "generation": generation,
        "origin": candidate.origin,
        "values": list(candidate.values),
        "start_tokens": candidate.start_tokens,
        "attention_factor": candidate.attention_factor,
        "score": score.value,
        "parts": {"text": score.text, "answer": score.answer},
        "seconds": round(seconds, 4),
    }


def model_digest(model: Any) -> str:
    """Short name of a model's config and weights, from a few values of every parameter."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
