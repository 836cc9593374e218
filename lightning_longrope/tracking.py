"""What a run tells its loggers beyond the scalars of Lightning.

Every logger gets numbers. wandb gets tables, figures and artifacts too, and charts with an axis of their own: the
generation of a search, the length of an evaluation. Nothing is lost without wandb: each of these is a file of the run
folder anyway. Only the first rank says something; the functions may be called on all of them.

A run folder is one wandb run: its id stands in ``wandb-id``, so a run that was cut goes on where it was.
"""

import io
import math
import re
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from lightning_longrope import peers
from lightning_longrope.files import write_text
from lightning_longrope.metrics import Measurement
from lightning_longrope.reading import read_text
from lightning_longrope.redaction import redact_words
from lightning_longrope.reporting import figures
from lightning_longrope.reporting.names import ACCURACIES
from lightning_longrope.reporting.results import COLUMNS, Result, Results, results_text
from lightning_longrope.reporting.run_folder import read_search

if TYPE_CHECKING:
    from lightning_longrope.reporting.drawing import Plot

ID_FILE = "wandb-id"
_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)


def log_config(trainer: Trainer, config: str) -> None:
    """Gives wandb the configuration of the run.

    Args:
        trainer: Its loggers are told.
        config: YAML, free of credentials.
    """
    for run in _wandb_runs(trainer):
        run.config.update(yaml.safe_load(config), allow_val_change=True)


def log_search(trainer: Trainer, generation: int, values: Mapping[str, float]) -> None:
    """Logs where a search stands after a generation.

    Args:
        trainer: Its loggers are told.
        generation: The horizontal axis; in wandb ``search/generation``, elsewhere the step.
        values: Numbers by name, without ``search/``.
    """
    if not trainer.is_global_zero:
        return
    named = {f"search/{name}": value for name, value in values.items() if math.isfinite(value)}
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            _log_against(logger.experiment, "search/generation", generation, named)
        else:
            logger.log_metrics({"search/generation": generation, **named}, step=generation)


def log_search_result(trainer: Trainer, folder: Path) -> None:
    """Gives wandb what a finished search has written: its history, its figures, and the factors as an artifact.

    Args:
        trainer: Its loggers are told.
        folder: The ``search`` folder of the run.
    """
    runs = _wandb_runs(trainer)
    search = read_search(folder, []) if runs else None
    if search is None:
        return
    plots = [figures.search_curve(search)]
    if search.factors is not None:
        plots.append(figures.factors_by_pair(search.factors, search.state.get("base")))
    drawn = [plot for plot in plots if plot is not None]
    files = [folder / name for name in ("factors.json", "rescale_factors.csv", "history.jsonl")]
    for run in runs:
        run.log({f"tables/{plot.name}": _table(plot.columns, plot.rows) for plot in drawn} | _images(drawn))
        artifact = _artifact(run, "factors", "factors")
        for path in files:
            if path.exists():
                artifact.add_file(str(path))
        run.log_artifact(artifact)


def log_results(trainer: Trainer, name: str, results: Results) -> None:
    """Gives wandb what was measured now: every row as the table ``tables/{name}``, accuracies by depth as heat maps.

    Means as scalars by step are logged by who measured. Outside of a fit, ``log_final_results`` follows.

    Args:
        trainer: Its loggers are told.
        name: Of the table: what measured.
        results: The measurements.
    """
    runs = _wandb_runs(trainer) if len(results) else []
    maps = _images(_heat_maps(results)) if runs else {}
    rows = [(trainer.global_step, *astuple(row)) for row in results.rows]
    for run in runs:
        run.log(
            {f"tables/{name}": _table(("step", *COLUMNS), rows), **maps, "trainer/global_step": trainer.global_step}
        )
    if trainer.state.fn != TrainerFn.FITTING:
        log_final_results(trainer, name, results)


def log_final_results(trainer: Trainer, name: str, results: Results) -> None:
    """Gives wandb the last measurements of a run: ``eval/*`` against ``eval/length``, and an artifact.

    One method is logged as ``eval/{metric}``, several as ``eval/{metric}/{method}``.

    Args:
        trainer: Its loggers are told.
        name: Of the artifact: what measured.
        results: The measurements.
    """
    means = [row for row in results.rows if row.depth is None]
    several = len({row.method for row in means}) > 1
    for run in _wandb_runs(trainer) if len(results) else ():
        for length in sorted({row.length for row in means}):
            found = [row for row in means if row.length == length]
            values = {f"eval/{r.metric}" + (f"/{r.method}" if several else ""): r.value for r in found}
            _log_against(run, "eval/length", length, values)
        artifact = _artifact(run, f"results-{name}", "results")
        with artifact.new_file("results.csv") as file:
            file.write(results_text(results))
        run.log_artifact(artifact)


def as_results(measurements: Iterable[Measurement], method: str = "model") -> Results:
    """Measurements of one model as a table."""
    return Results(Result(method, m.metric, m.length, m.depth, m.value, m.low, m.high, m.n) for m in measurements)


def keep_wandb_id(config: Any, root: str | None, resumed: bool, measuring: bool = False) -> None:
    """Gives the wandb loggers of a configuration the id of their run folder, unless they have one.

    The id is read from ``wandb-id``, or made and written there. Where no folder is named the current one serves many
    runs; then the id is taken up only by training that is resumed.

    Args:
        config: The ``trainer`` part of a LightningCLI configuration; ``id`` of its loggers is set in place.
        root: ``default_root_dir`` of the trainer, or None.
        resumed: Training goes on from a checkpoint.
        measuring: The folder may be that of another run, which is alive: its id is left alone, and none is written.
    """
    path = Path(root or ".") / ID_FILE
    for logger in config.logger if isinstance(config.logger, list) else [config.logger]:
        settings = getattr(logger, "init_args", None)
        if settings is None or not str(logger.class_path).endswith("WandbLogger"):
            continue
        if not measuring and settings.get("id") is None and settings.get("version") is None:
            settings["id"] = _kept_id(path, keep=root is not None or resumed)
        if root is not None and str(settings.get("save_dir")) == ".":
            settings["save_dir"] = root


def hide_words(trainer: Trainer) -> None:
    """Lets wandb, which keeps the words of the command line, see them without credentials.

    Other processes are started with all of them, before a logger begins its run.

    Args:
        trainer: Its loggers are changed in place.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and type(logger).__reduce_ex__ is not _by_its_class:
            logger.__class__ = _hiding(type(logger))


def _hiding(kind: type[WandbLogger]) -> type[Any]:
    return type(kind.__name__, (kind,), {"experiment": property(_begun), "__reduce_ex__": _by_its_class})


def _begun(logger: WandbLogger) -> Any:
    """The run of a logger whose class is one of ``_hiding``."""
    words = sys.argv
    sys.argv = redact_words(words)
    try:
        return super(type(logger), logger).experiment  # type: ignore[misc]
    finally:
        sys.argv = words


def _by_its_class(logger: WandbLogger, _: Any) -> Any:
    """What pickle keeps: the class that was there before, since the one of ``_hiding`` is in no module."""
    return _hidden_again, (type(logger).__base__,), logger.__getstate__()


def _hidden_again(kind: type[WandbLogger]) -> Any:
    """An empty logger, for pickle to fill."""
    return object.__new__(_hiding(kind))


def _kept_id(path: Path, keep: bool) -> str | None:
    if not peers.is_first():
        return None  # only the first rank has a run
    known = read_text(path, 1024).strip() if keep and path.is_file() else ""
    if known and not _ID.fullmatch(known):
        raise ValueError(f"{path} is damaged, it holds no id of a wandb run: delete it to begin a new run there.")
    if not known:
        known = uuid.uuid4().hex[:8]
        write_text(path, f"{known}\n")
    return known


def finish(trainer: Trainer) -> None:
    """Ends the wandb runs of a trainer, so that the next stage of the same process has one of its own."""
    for run in _wandb_runs(trainer):
        run.finish()


def _wandb_runs(trainer: Trainer) -> list[Any]:
    """The open wandb runs; none on other ranks than the first."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _log_against(run: Any, axis: str, position: float, values: Mapping[str, float]) -> None:
    """One point of each curve. The names are defined one by one: which of two patterns wins is not documented."""
    for name in values:
        run.define_metric(name, step_metric=axis)
    run.log({axis: position, **values})


def _heat_maps(results: Results) -> "list[Plot]":
    found = [figures.heat_maps(results, metric, f"{metric}_depth") for metric in ACCURACIES]
    return [plot for plot in found if plot is not None]


def _images(plots: "Iterable[Plot]") -> dict[str, Any]:
    import wandb
    from PIL import Image

    return {
        f"figures/{plot.name}": wandb.Image(Image.open(io.BytesIO(plot.png())), caption=plot.caption) for plot in plots
    }


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)


def _artifact(run: Any, name: str, kind: str) -> Any:
    """An empty artifact ``<name>-<id of the run>``; where it is logged again, unchanged files cost nothing."""
    import wandb

    return wandb.Artifact(f"{name}-{run.id}", type=kind)
