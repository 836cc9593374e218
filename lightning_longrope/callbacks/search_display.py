"""What people see of a running search: a bar of the trainer's own kind, and scalars in its loggers."""

from typing import Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_longrope.search_folder import SearchRun
from lightning_longrope.tracking import log_search


class _Bar(Protocol):
    def show(self, run: SearchRun) -> None: ...

    def close(self) -> None: ...


class SearchDisplay:
    """Shows a search while it runs; a context manager whose value is called with the state of the search.

    A bar where the trainer shows one, and after each generation ``search/generation``, ``search/best``,
    ``search/median``, counts and seconds in every logger of the trainer.

    Args:
        trainer: Has the bar and the loggers.

    Attributes:
        generation: Number of generations logged.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._bar: _Bar | None = None
        self.generation = 0

    def __enter__(self) -> "SearchDisplay":
        bar = self._trainer.progress_bar_callback
        if self._trainer.is_global_zero and isinstance(bar, ProgressBar) and getattr(bar, "is_enabled", True):
            self._bar = _RichBar() if isinstance(bar, RichProgressBar) else _TqdmBar()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, run: SearchRun) -> None:
        """Brings the bar up to date, and logs when a generation has ended."""
        if self._bar is not None:
            self._bar.show(run)
        if run.generation > self.generation:
            self.generation = run.generation
            log_search(self._trainer, run.generation, run.metrics())


def summary(run: SearchRun) -> dict[str, str]:
    """What stands behind the bar: generation, best, median, the best baseline, counts, seconds of an evaluation."""
    shown = {"generation": str(run.generation), "best": f"{run.best:.4f}", "median": f"{run.median:.4f}"}
    if run.baselines:
        name = min(run.baselines, key=lambda name: run.baselines[name])
        shown[name] = f"{run.baselines[name]:.4f}"
    counts = {name: getattr(run, name) for name in ("dropped", "cached", "failed")}
    shown |= {name: str(count) for name, count in counts.items() if count}
    return {**shown, "each": f"{run.seconds:.2g}s"}


class _TqdmBar:
    def __init__(self) -> None:
        self._bar: Tqdm | None = None

    def show(self, run: SearchRun) -> None:
        if self._bar is None:
            self._bar = Tqdm(total=run.limit, desc="Search", unit="candidate", dynamic_ncols=True)
        self._bar.set_postfix(summary(run))
        self._bar.update(run.evaluations - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _RichBar:
    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        whole = Column(no_wrap=True, min_width=8)  # on a narrow screen the summary gives way
        self._progress = Progress(
            TextColumn("Search"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            TextColumn("{task.fields[summary]}"),
        )
        self._progress.start()
        self._task = self._progress.add_task("search", total=None, summary="")

    def show(self, run: SearchRun) -> None:
        text = " ".join(f"{name}={value}" for name, value in summary(run).items())
        self._progress.update(self._task, total=run.limit, completed=run.evaluations, summary=text)

    def close(self) -> None:
        self._progress.stop()
