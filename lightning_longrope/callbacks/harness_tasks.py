"""Benchmarks of the lm-evaluation-harness as a callback."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_longrope.callbacks.measurement import Measurement, MeasuringCallback
from lightning_longrope.harness import Ranks, run_tasks
from lightning_longrope.loading import load_tokenizer
from lightning_longrope.model import window


class HarnessTasks(MeasuringCallback):
    """Runs tasks of the lm-evaluation-harness (ARC, HellaSwag, MMLU, RULER, tasks of one's own) on the model.

    Logs every number of every task and group as ``{task}_{metric}/{length}``, and those of RULER's tasks as
    ``{task}/{length}``. Intervals are 95 % intervals from the harness's standard errors. Needs the extra ``lm-eval``;
    RULER's tasks need more, which their error names.

    Does not cut a short benchmark to many lengths: tasks that make no prompts of a length run once, at the longest.

    Args:
        tasks: Names of tasks or groups.
        lengths: Lengths of RULER's prompts in tokens; prompts of other tasks are cut to the longest. The datamodule's
            ``seq_len`` by default.
        num_fewshot: Examples before each question; the task's own number by default.
        limit: Most documents of each task.
        include_path: Folder with tasks of one's own (YAML).
        batch_tokens: Tokens of a forward pass; a longer prompt goes alone.
        seed: Chooses the examples.
        every_n_steps: Optimizer steps between two measurements of a fit; None measures at every validation.
        every_n_epochs: The same in epochs.

    Raises:
        ValueError: If there is no task or a number is out of range, and when measuring if a task is unknown.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        lengths: tuple[int, ...] | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        include_path: str | None = None,
        batch_tokens: int = 16384,
        seed: int = 0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
    ) -> None:
        super().__init__(lengths, "validation", batch_tokens, seed, every_n_steps, every_n_epochs)
        if not tasks:
            raise ValueError("`tasks` needs at least one task of the lm-evaluation-harness, got none.")
        self.tasks = tuple(tasks)
        self.num_fewshot = num_fewshot
        self.limit = limit
        if include_path is not None and not Path(include_path).is_dir():
            raise ValueError(f"`include_path` must be a folder with tasks (YAML), and there is none at {include_path}.")
        self.include_path = include_path
        self._tokenizer: Any = None

    @override
    def connect(self, trainer: Trainer) -> None:
        module: Any = trainer.lightning_module
        datamodule = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "tokenizer"):  # the tasks bring their own text
            self._resolved = self.lengths or (window(module.model),)
            self._tokenizer = self._tokenizer or load_tokenizer(module.name_or_path, module.trust_remote_code)
        else:
            super().connect(trainer)

    @override
    def prepare(self, datamodule: Any, lengths: Sequence[int]) -> None:
        self._tokenizer = datamodule.tokenizer

    @override
    def measure_length(self, trainer: Trainer, module: LightningModule, length: int) -> list[Measurement]:
        return self.measure_lengths(trainer, module, [length])

    @override
    def measure_lengths(self, trainer: Trainer, module: LightningModule, lengths: Sequence[int]) -> list[Measurement]:
        return run_tasks(
            module.model,
            self._tokenizer,
            self.tasks,
            lengths=lengths,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            include_path=self.include_path,
            batch_tokens=self.batch_tokens,
            seed=self.seed,
            ranks=Ranks(
                share=lambda items: self.share(trainer, items), sum=lambda values: self.sum_over_ranks(trainer, values)
            ),
        )
