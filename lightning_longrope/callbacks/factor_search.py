"""Searches the rescale factors before training, on the ranks of the trainer."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_longrope import tracking
from lightning_longrope.callbacks.search_display import SearchDisplay
from lightning_longrope.callbacks.workers import TrainerWorkers
from lightning_longrope.checking import LARGEST_SEED
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.model import install_factors, installed_factors, rope_geometry
from lightning_longrope.objectives import Objective, ObjectiveName
from lightning_longrope.search import SearchAlgorithm, SearchResult
from lightning_longrope.search.judgement import HeldOut
from lightning_longrope.searching import search_factors

log = logging.getLogger(__name__)


class FactorSearch(Callback):
    """Finds the rescale factors for a longer window and installs them, before the first training step.

    The search runs in ``on_train_start`` of a fit, after any checkpoint is restored, or in ``longrope search``
    without an optimizer. It is skipped when the run it belongs to is finished or training is resumed. A search that
    was cut goes on where it was. Documents come from the validation split of the datamodule (its ``excerpts``), so
    test documents stay unseen; those of the judgement at the end do not overlap with those of the search.

    On a model with factors installed and a longer target the candidates multiply them. With ``recovery`` the search is
    for short texts: it runs at the end of a fit, installs nothing, and leaves the short table of ``longrope export
    --short`` in ``search_short/factors.json``.

    Writes ``search/{history.jsonl,held_out.jsonl,state.json,factors.json,rescale_factors.csv}`` in the trainer's root
    folder. Logs ``search/generation``, ``search/best``, ``search/median``, ``search/evaluations`` and others after
    each generation, and ``search/held_out`` at the end.

    Args:
        target_length: Window to reach in tokens; the datamodule's ``seq_len`` by default, in a recovery the model's own
            window.
        documents: Number of documents a candidate is judged on.
        held_out: Number of further documents that only the judgement of the winner sees; 0 for no judgement.
        algorithm: What proposes candidates; by default ``RampSearch``, in a recovery ``RecoverySearch``.
        objective: ``mixed`` (text and pass keys), ``needle`` (pass keys only), ``perplexity`` (text only), or an
            ``Objective``.
        max_evaluations: Most candidates; the algorithm's own number by default.
        patience: End after so many candidates without a better one; None goes on to the budget.
        pinned: Number of fastest frequency pairs held at 1; an eighth of them, 4 at most, by default.
        start_tokens: Allowed numbers of first tokens that keep their pretrained angles; only 0 by default.
        space: Further arguments of ``SearchSpace``; ``warm_start`` may be a file of factors.
        multiply: Whether candidates multiply installed factors; by default where there are some for a shorter target.
        recovery: Whether to search a table for short texts.
        race: Standard errors behind the worst candidate that matters at which one is dropped; None for no race.
        schedule: Pairs of a share of the evaluations and the number of documents that candidates are judged on so far,
            such as ``((0.5, 4),)``; all documents from the start by default.
        caches: Journals of other searches of this model, whose scores on the same documents are used.
        batch_tokens: Tokens per forward pass; 16,384 by default, on a CPU 2,048.
        seed: Of candidates, documents and pass keys.

    Raises:
        ValueError: If a number is out of range; in ``setup``, if there is no datamodule with ``excerpts``.
    """

    def __init__(
        self,
        target_length: int | None = None,
        documents: int = 16,
        held_out: int = 8,
        algorithm: SearchAlgorithm | None = None,
        objective: Objective | ObjectiveName = "mixed",
        max_evaluations: int | None = None,
        patience: int | None = None,
        pinned: int | None = None,
        start_tokens: tuple[int, ...] | None = None,
        space: dict[str, Any] | None = None,
        multiply: bool | None = None,
        recovery: bool = False,
        race: float | None = None,
        schedule: tuple[tuple[float, int], ...] = (),
        caches: tuple[str, ...] = (),
        batch_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        if documents < 1:
            raise ValueError(f"`documents` must be at least 1, got {documents}.")
        if held_out < 0 or held_out == 1:
            raise ValueError(f"`held_out` must be 0 or at least 2, got {held_out}.")
        self.target_length = target_length
        self.documents = documents
        self.held_out = held_out
        self.algorithm = algorithm
        self.objective: Objective | ObjectiveName = objective
        self.max_evaluations = max_evaluations
        self.patience = patience
        self.pinned = pinned
        self.start_tokens = None if start_tokens is None else tuple(start_tokens)
        self.space = space
        self.multiply = multiply
        self.recovery = recovery
        self.race = race
        self.schedule = tuple(schedule)
        self.caches = tuple(caches)
        self.batch_tokens = batch_tokens
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"`seed` of FactorSearch must be from 0 to {LARGEST_SEED}, got {seed}.")
        self.seed = seed
        self.result: SearchResult | None = None
        """What the search found, with its score on held-out documents."""
        self.alone = False
        """Whether the search is the whole run (``longrope search``), not the start of a fit."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(trainer.datamodule, "excerpts"):  # type: ignore[attr-defined]
            raise ValueError(
                "FactorSearch needs a datamodule with `excerpts` to search on (all of this package have it),"
                f" got {type(trainer.datamodule).__name__}."  # type: ignore[attr-defined]
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.recovery:
            return
        if trainer.ckpt_path and installed_factors(pl_module.model) is not None:
            log.info("Resumed with factors: no search.")
            return
        self.search(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.recovery:
            self.search(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.alone:
            self.search(trainer, pl_module)

    def search(self, trainer: Trainer, module: LightningModule) -> RescaleFactors:
        """Runs or finishes the search and installs what it found, the same on every rank."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        length = self.target_length or self._own_length(module, datamodule)
        folder = Path(trainer.default_root_dir) / ("search_short" if self.recovery else "search")
        texts = datamodule.excerpts("validation", self.documents + self.held_out, length, self.seed)
        # excerpts come in the order of the documents, and sources of text often lie one behind the other
        texts = texts[np.random.default_rng(self.seed).permutation(len(texts))]
        with trainer.precision_plugin.val_step_context(), SearchDisplay(trainer) as show:
            self.result = search_factors(
                module.model,
                list(texts),
                length,
                tokenizer=None if self.objective == "perplexity" else datamodule.tokenizer,
                algorithm=self.algorithm,
                objective=self.objective,
                max_evaluations=self.max_evaluations,
                patience=self.patience,
                seed=self.seed,
                pinned=self.pinned,
                start_tokens=self.start_tokens,
                space=self.space,
                multiply=self.multiply,
                recovery=self.recovery,
                held_out=self.held_out,
                race=self.race,
                schedule=self.schedule,
                folder=folder,
                caches=self.caches,
                batch_tokens=self.batch_tokens,
                workers=TrainerWorkers(trainer),
                progress=show,
            )
        if not self.recovery:
            install_factors(module.model, self.result.factors)
        if self.result.held_out is not None:
            tracking.log_search(trainer, show.generation, _scalars(self.result.held_out))
        tracking.log_search_result(trainer, folder)
        return self.result.factors

    def _own_length(self, module: LightningModule, datamodule: Any) -> int:
        model: Any = module.model
        return int(rope_geometry(model.config).original_length if self.recovery else datamodule.seq_len)


def _scalars(judged: HeldOut) -> dict[str, float]:
    """The judgement as loggers get it."""
    named = {f"held_out_{name}": score for name, score in judged.baselines.items()}
    return {"held_out": judged.score, "held_out_difference": judged.difference, **named}
