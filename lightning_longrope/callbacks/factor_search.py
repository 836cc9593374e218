"""Searches the rescale factors before training, on the ranks of the trainer."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor
from typing_extensions import override

from lightning_longrope import tracking
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.model import install_factors, installed_factors
from lightning_longrope.scoring import Objective
from lightning_longrope.search import RampSearch, SearchAlgorithm
from lightning_longrope.searching import SearchRun, search_factors

log = logging.getLogger(__name__)


class FactorSearch(Callback):
    """Finds the rescale factors for a longer window and installs them, before the first training step.

    The search runs in ``on_train_start`` of a fit, after any checkpoint is restored, or in ``longrope search``
    without an optimizer. It is skipped when the run it belongs to is finished or training is resumed. A search that
    was cut goes on where it was. Documents come from the validation split of the datamodule (its ``excerpts``), so
    test documents stay unseen.

    Writes ``search/{history.jsonl,state.json,factors.json,rescale_factors.csv}`` in the trainer's root folder and logs
    ``search/best``.

    Args:
        target_length: Window to reach in tokens; the datamodule's ``seq_len`` by default.
        documents: Number of documents a candidate is judged on.
        algorithm: What proposes candidates.
        objective: ``mixed`` (text and pass keys), ``needle`` (pass keys only) or ``perplexity`` (text only).
        max_evaluations: Most candidates; the algorithm's own number by default.
        pinned: Number of fastest frequency pairs held at 1; an eighth of them, 4 at most, by default.
        start_tokens: Allowed numbers of first tokens that keep their pretrained angles.
        batch_tokens: Tokens per forward pass.
        seed: Of candidates, documents and pass keys.

    Raises:
        ValueError: In ``setup``, if ``documents`` is not positive or there is no datamodule with ``excerpts``.
    """

    def __init__(
        self,
        target_length: int | None = None,
        documents: int = 5,
        algorithm: SearchAlgorithm | None = None,
        objective: Objective = "mixed",
        max_evaluations: int | None = None,
        pinned: int | None = None,
        start_tokens: tuple[int, ...] = (0,),
        batch_tokens: int = 16384,
        seed: int = 0,
    ) -> None:
        if documents < 1:
            raise ValueError(f"`documents` must be at least 1, got {documents}.")
        self.target_length = target_length
        self.documents = documents
        self.algorithm = algorithm or RampSearch()
        self.objective: Objective = objective
        self.max_evaluations = max_evaluations
        self.pinned = pinned
        self.start_tokens = tuple(start_tokens)
        self.batch_tokens = batch_tokens
        self.seed = seed
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
        if trainer.ckpt_path and installed_factors(pl_module.model) is not None:
            log.info("Resumed with factors: no search.")
            return
        self.search(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.alone:
            self.search(trainer, pl_module)

    def search(self, trainer: Trainer, module: LightningModule) -> RescaleFactors:
        """Runs or finishes the search and installs what it found, the same on every rank."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        length = self.target_length or datamodule.seq_len
        texts = datamodule.excerpts("validation", self.documents, length, self.seed)
        with trainer.precision_plugin.val_step_context(), _Bar(trainer) as show:

            def progress(run: SearchRun) -> None:
                show(run)
                values = {"best": run.best, "evaluations": run.evaluations, "forwards": run.forwards}
                tracking.log_search(trainer, run.generation, values | run.baselines)

            result = search_factors(
                module.model,
                list(texts),
                length,
                tokenizer=None if self.objective == "perplexity" else datamodule.tokenizer,
                algorithm=self.algorithm,
                objective=self.objective,
                max_evaluations=self.max_evaluations,
                seed=self.seed,
                pinned=self.pinned,
                start_tokens=self.start_tokens,
                folder=Path(trainer.default_root_dir) / "search",
                batch_tokens=self.batch_tokens,
                workers=TrainerWorkers(trainer),
                progress=progress,
            )
        install_factors(module.model, result.factors)
        tracking.log_search_result(trainer, Path(trainer.default_root_dir) / "search")
        return result.factors


class TrainerWorkers:
    """The ranks of a trainer as the workers of a search."""

    def __init__(self, trainer: Trainer) -> None:
        self.rank = trainer.global_rank
        self.world_size = trainer.world_size
        self._strategy = trainer.strategy

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, on the CPU."""
        total = self._strategy.reduce(values.to(self._strategy.root_device), reduce_op="sum")
        return total.cpu()


class _Bar:
    """The trainer's own kind of progress bar, where the trainer shows one."""

    def __init__(self, trainer: Trainer) -> None:
        self._shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        self._bar: Tqdm | None = None

    def __enter__(self) -> Callable[[SearchRun], None]:
        return self._show

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show(self, run: SearchRun) -> None:
        if not self._shown:
            return
        if self._bar is None:
            self._bar = Tqdm(total=run.limit, desc="Search", unit="candidate", dynamic_ncols=True)
        self._bar.set_postfix(
            generation=run.generation, best=f"{run.best:.4f}", yarn=f"{run.baselines['yarn']:.4f}", cached=run.cached
        )
        self._bar.update(run.evaluations - self._bar.n)
