"""A run folder as data: what each stage configured, searched, trained and measured. Reads, never writes."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_longrope.factors import RescaleFactors
from lightning_longrope.reading import MALFORMED, is_number, number, parse_yaml, read_json, read_table, read_text, whole
from lightning_longrope.redaction import redact, redact_all
from lightning_longrope.reporting.results import Result, Results, join_results, read_results
from lightning_longrope.search.journal import read_journal


@dataclass(frozen=True)
class Search:
    """A factor search, finished or not."""

    evaluations: tuple[dict[str, Any], ...]
    """Lines of ``history.jsonl``: evaluation, origin, score (None where it was not finite), parts, seconds."""
    state: dict[str, Any]
    """``state.json``: objective, lengths, counts, scores of the baselines."""
    factors: RescaleFactors | None
    """The best factors; None until the search has ended."""


@dataclass(frozen=True)
class Curve:
    """One logged loss over the steps of a stage."""

    metric: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class PositionMean:
    """Mean nll of the tokens at some positions of a window, a row of ``positions.csv``."""

    method: str
    length: int
    """Tokens of the window."""
    start: int
    end: int
    """Position after the last."""
    nll: float
    """Nats per token."""
    low: float
    high: float


@dataclass(frozen=True)
class Stage:
    """One folder of a run; every part may be missing."""

    name: str
    folder: Path | None = None
    config: str | None = None
    """Text of ``config.yaml``."""
    results: tuple[Result, ...] = ()
    search: Search | None = None
    recovery: Search | None = None
    """A search for short texts."""
    losses: tuple[Curve, ...] = ()
    positions: tuple[PositionMean, ...] = ()
    command: str | None = None
    seconds: float | None = None
    status: str | None = None


@dataclass(frozen=True)
class Run:
    """A recipe's folder, or a single stage's."""

    folder: Path
    name: str
    stages: tuple[Stage, ...]
    results: Results
    about: dict[str, Any]
    """``run.json``: command, seed, versions, machine."""
    notes: tuple[str, ...] = field(default=())
    """What could not be read, one sentence each."""

    @property
    def data_pictures(self) -> list[Path]:
        """PNG files that ``longrope data`` has drawn, of the run or of its stages."""
        folders = dict.fromkeys([self.folder, *(stage.folder for stage in self.stages if stage.folder)])
        return [path for folder in folders for path in sorted((folder / "figures").glob("data*.png"))]

    def rope_base(self, stage: Stage) -> float | None:
        """Base of the rotary embedding: what the search wrote down, else the first ``rope_theta`` of the configs."""
        searches = [search for search in (stage.search, stage.recovery) if search is not None]
        known = next((base for search in searches if (base := search.state.get("base")) is not None), None)
        found = [known, *(_find(config_of(one), "rope_theta") for one in (stage, *self.stages))]
        return next((base for value in found if (base := _base(value)) is not None), None)


def read_run(folder: str | Path) -> Run:
    """Reads a recipe's folder with its stages, or the folder of a single stage.

    A part that is missing is left out. One that cannot be read becomes a note, except measurements: those are an error.

    Raises:
        ValueError: If the folder is missing or holds nothing to report, or a ``results.csv`` is damaged.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise ValueError(f"No run at `{folder}`: expected the folder that `longrope run` or `longrope fit` wrote.")
    notes: list[str] = []
    about = _read_mapping(folder / "run.json", notes)
    stages = _stages(folder, about, notes)
    if not any(stage.config or stage.results or stage.search or stage.recovery or stage.losses for stage in stages):
        raise ValueError(
            f"Nothing to report in `{folder}`: expected config.yaml, search/, eval/results.csv or metrics.csv"
            " there or in the folder of a stage."
        )
    results, replaced = join_results([stage.results for stage in stages])
    if replaced:
        notes.append(
            f"Measurements that two stages made with different values, of which the later is shown: {replaced}."
        )
    name = Path(str(about.get("recipe") or folder.name)).name
    return Run(folder, name, stages, results, about, tuple(notes))


def _stages(folder: Path, about: dict[str, Any], notes: list[str]) -> tuple[Stage, ...]:
    """Stages in the order of ``run.json``, others after them by number; a stage that left no folder is kept."""
    listed = about.get("stages")
    entries = {str(entry["name"]): entry for entry in listed or [] if isinstance(entry, dict) and "name" in entry}
    folders = {path.name: path for path in sorted(folder.iterdir(), key=_number) if _is_stage(path)}
    if _is_stage(folder):
        folders[folder.name] = folder
    return tuple(_stage(name, folders.get(name), entries.get(name, {}), notes) for name in {**entries, **folders})


def _is_stage(path: Path) -> bool:
    parts = ("config.yaml", "search", "search_short", "eval/results.csv", "metrics.csv", "lightning_logs")
    return path.is_dir() and any((path / part).exists() for part in parts)


def _stage(name: str, folder: Path | None, entry: dict[str, Any], notes: list[str]) -> Stage:
    seconds = entry.get("seconds")
    done: dict[str, Any] = {
        "command": _optional_text(entry.get("command")),
        "seconds": float(seconds) if seconds is not None and is_number(seconds) else None,
        "status": _optional_text(entry.get("status")),
    }
    if folder is None:
        return Stage(name, **done)
    results, positions = (folder / "eval" / name for name in ("results.csv", "positions.csv"))
    config = folder / "config.yaml"
    return Stage(
        name,
        folder,
        config=_try(lambda: redact(read_text(config)), config, notes),
        results=tuple(read_results(results)) if results.is_file() else (),
        search=read_search(folder / "search", notes),
        recovery=read_search(folder / "search_short", notes),
        losses=_losses(folder, notes),
        positions=_try(lambda: _positions(positions), positions, notes) or (),
        **done,
    )


def read_search(folder: Path, notes: list[str]) -> Search | None:
    """Reads a search folder, finished or not; None if there is nothing in it.

    Args:
        folder: Holds ``history.jsonl``, ``state.json`` and ``factors.json``, or some of them.
        notes: Gets a sentence for each file that cannot be read.
    """
    journal, state, factors = (folder / name for name in ("history.jsonl", "state.json", "factors.json"))
    search = Search(
        evaluations=tuple(_try(lambda: read_journal(journal)[1], journal, notes) or ()),
        state=_read_mapping(state, notes),
        factors=_try(lambda: RescaleFactors.load(factors, monotone=False), factors, notes),
    )
    return search if search.evaluations or search.state or search.factors else None


def _losses(folder: Path, notes: list[str]) -> tuple[Curve, ...]:
    """Every logged loss; where a run was resumed, a later version of the log replaces the steps it repeats."""
    curves: dict[str, dict[int, float]] = {}
    patterns = ("metrics.csv", "*/metrics.csv", "*/version_*/metrics.csv")
    for path in sorted((path for pattern in patterns for path in folder.glob(pattern)), key=_number):
        for metric, step, value in _try(lambda path=path: _logged_losses(path), path, notes) or ():  # type: ignore[misc]
            curves.setdefault(metric, {})[step] = value
    return tuple(Curve(metric, *_columns(values)) for metric, values in sorted(curves.items(), key=_training_first))


def _logged_losses(path: Path) -> list[tuple[str, int, float]]:
    return [
        (column.removesuffix("_step"), whole(row["step"]), number(text))
        for _, row in read_table(path, ["step"])
        for column, text in row.items()
        if text and "loss" in column and not column.endswith("_epoch")
    ]


def _positions(path: Path) -> tuple[PositionMean, ...]:
    counts, values = ("length", "start", "end"), ("nll", "low", "high")
    return tuple(
        PositionMean(row["method"], *(whole(row[name]) for name in counts), *(number(row[name]) for name in values))
        for _, row in read_table(path, ["method", *counts, *values])
    )


def _columns(values: dict[int, float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    steps = sorted(values)
    return tuple(steps), tuple(values[step] for step in steps)


def _training_first(item: tuple[str, Any]) -> tuple[bool, str]:
    return not item[0].startswith("train"), item[0]


def _try(read: Callable[[], Any], path: Path, notes: list[str]) -> Any:
    """What ``read`` gives; None if the file is not there, or not readable, which is noted."""
    if not path.is_file():
        return None
    try:
        return read()
    except (*MALFORMED, OSError) as error:
        notes.append(f"{path.parent.name}/{path.name} could not be read: {error}")
        return None


def _read_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    value = _try(lambda: read_json(path), path, notes)
    return redact_all(value) if isinstance(value, dict) else {}


def _optional_text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(path: Path) -> list[tuple[int, str]]:
    """Natural order: 2-search before 10-export, version_9 before version_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _base(value: Any) -> float | None:
    """A base as YAML and JSON have it, where ``1e4`` is a text; None for what is no number."""
    with suppress(ValueError):
        return number(str(value)) if is_number(value) or isinstance(value, str) else None
    return None


def config_of(stage: Stage) -> Any:
    """What the configuration of a stage says; None if it has none, or one that is damaged."""
    try:
        return parse_yaml(stage.config or "", "config.yaml")
    except ValueError:
        return None


def _find(tree: Any, key: str) -> Any:
    """The first value under ``key`` at any depth."""
    if isinstance(tree, dict) and tree.get(key) is not None:
        return tree[key]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return next((found for branch in branches if (found := _find(branch, key)) is not None), None)
