"""Several runs on one page: who won where, the same measurements beside each other, and what was set differently."""

import base64
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from lightning_longrope.files import write_text
from lightning_longrope.reading import parse_yaml
from lightning_longrope.reporting import page, run_figures, tables
from lightning_longrope.reporting.names import length_text, metric_name, palette, run_slot, seconds_text
from lightning_longrope.reporting.results import COLUMNS, Results, table_text
from lightning_longrope.reporting.run_folder import Run, Search, read_run
from lightning_longrope.reporting.tables import Cell, Line, Table
from lightning_longrope.reporting.verdict import (
    SHORT_NAMES,
    Comparison,
    Extension,
    Outcome,
    baseline_name,
    claims,
    verdict,
)

_METHODS = ("searched", "tuned", "yarn", "none")
_MAIN = ("perplexity", "perplexity_last128", *page.TASKS)
_VERBS: dict[Outcome, tuple[str, str]] = {
    "better": ("beats the best formula", "beat the best formula"),
    "same": ("is within the noise", "are within the noise"),
    "worse": ("loses to it", "lose to it"),
    "unknown": ("has no interval", "have no interval"),
}


@dataclass(frozen=True)
class Column:
    """One of the runs."""

    name: str
    """Short, and different from the others'."""
    run: Run
    extension: Extension
    claims: dict[str, Comparison]
    headline: str
    link: str | None
    """Its own report, from the folder of the page."""

    @property
    def search(self) -> Search | None:
        """Its last search."""
        return next((stage.search for stage in reversed(self.run.stages) if stage.search), None)


def write_comparison(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Writes one self-contained page about several runs. Changes nothing in their folders.

    Args:
        runs: Folders of recipes or stages, at least two.
        out: The HTML file.

    Returns:
        Its path.

    Raises:
        ValueError: If there are fewer than two runs, one is given twice, or one has nothing to report; or if another
            file than such a page is there.
    """
    folders = [Path(run).resolve() for run in runs]
    if len(folders) < 2 or len(set(folders)) < len(folders):
        raise ValueError(f"A comparison needs at least two different runs, got {', '.join(map(str, runs)) or 'none'}.")
    out = Path(out).absolute()
    if out.is_dir():
        raise ValueError(f"`--out` names a file, and `{out}` is a folder.")
    if out.exists() and not _is_page(out):
        raise ValueError(f"`{out}` is there and is no page of `longrope report`: give another file with --out.")
    names = _names(folders)
    columns = [_column(name, read_run(folder), out.parent) for name, folder in zip(names, folders, strict=True)]
    write_text(out, _render(columns))
    return out


def _is_page(path: Path) -> bool:
    """Whether a file begins like a page of this package."""
    with path.open("rb") as file:
        return b": LongRoPE report</title>" in file.read(1 << 16)


def _column(name: str, run: Run, place: Path) -> Column:
    extension = (page.extensions(run) or [Extension()])[-1]
    report = run.folder / "report.html"
    link = Path(os.path.relpath(report, place)).as_posix() if report.is_file() else None
    headline = verdict(run.results, page.extensions(run)).headline
    return Column(name, run, extension, claims(run.results, extension), headline, link)


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _render(columns: Sequence[Column]) -> str:
    runs = [(column.name, column.run.results) for column in columns]
    measured = list(dict.fromkeys(metric for _, results in runs for metric in results.metrics))
    searches = [(column.name, column.search) for column in columns]
    plots = [run_figures.by_length(runs, metric) for metric in _MAIN]
    plots += [run_figures.search_curves(searches), run_figures.factor_tables(searches, _base(columns))]
    return (
        page.environment()
        .get_template("comparison.html.j2")
        .render(
            columns=[(column, run_slot(number)) for number, column in enumerate(columns)],
            headline=_headline(columns),
            palette=palette(),
            figures={plot.name: page.inline(plot) for plot in plots if plot is not None},
            overviews=_overviews(columns),
            sections=[(metric, _tables(runs, metric), _heat(runs, metric)) for metric in _MAIN if metric in measured],
            names={metric: metric_name(metric) for metric in measured},
            settings=differences([column.run for column in columns]),
            circumstances=_circumstances(columns),
            commands=[(column.name, column.run.about.get("command")) for column in columns],
            again=shlex.join(["longrope", "report", *(str(column.run.folder) for column in columns)]),
            csv=base64.b64encode(_csv(runs).encode()).decode(),
        )
    )


def _headline(columns: Sequence[Column]) -> str:
    """How often the searched factors win, by metric; those they win on first."""
    parts = []
    for metric in ("passkey", "perplexity"):
        outcomes = [column.claims[metric].outcome for column in columns if metric in column.claims]
        counts = {outcome: outcomes.count(outcome) for outcome in _VERBS if outcome in outcomes}
        words = [_counted(outcome, count, len(outcomes)) for outcome, count in counts.items()]
        if words:
            parts.append((-counts.get("better", 0), f"on {SHORT_NAMES[metric]} {', '.join(words)}"))
    if not parts:
        return f"{len(columns)} runs beside each other"
    searches = sum(bool(column.claims) for column in columns)
    return f"{searches} search{'es' * (searches > 1)}: {'; '.join(words for _, words in sorted(parts))}."


def _counted(outcome: Outcome, count: int, of: int) -> str:
    number = "the one" if of == 1 else f"all {of}" if count == of else str(count)
    return f"{number} {_VERBS[outcome][count > 1]}"


def _overviews(columns: Sequence[Column]) -> list[Table]:
    """A table for each metric: the claim of every run, and what tuning made of it."""
    found = []
    for metric in SHORT_NAMES:
        held = [(number, column) for number, column in enumerate(columns) if metric in column.claims]
        lengths = {column.claims[metric].ours.length for _, column in held}
        lines = [Line(column.name, run_slot(number), _claim_cells(column, metric)) for number, column in held]
        heads = ["best formula", "searched", "change", "tuned"]
        if len(lengths) > 1:
            heads = ["tokens", *heads]
            for line, (_, column) in zip(lines, held, strict=True):
                line.cells.insert(0, Cell(length_text(column.claims[metric].ours.length)))
        at = f" at {length_text(max(lengths))} tokens" if len(lengths) == 1 else ""
        if lines:
            found.append(Table(f"{metric_name(metric)}{at}", heads, lines))
    return found


def _claim_cells(column: Column, metric: str) -> list[Cell]:
    claim = column.claims[metric]
    tuned = column.run.results.get(column.extension.tuned, metric, claim.ours.length)
    theirs = tables.cell(claim.theirs)
    named = Cell(f"{baseline_name(claim)} {theirs.text}", theirs.ends, theirs.title)
    return [named, tables.cell(claim.ours), tables.change_cell(claim), tables.cell(tuned)]


def _time(run: Run) -> str:
    return seconds_text(page.total_seconds(run.stages))


def _base(columns: Sequence[Column]) -> float | None:
    """Base of the rotary embedding of the first run that searched."""
    found = [(column.run, stage) for column in columns for stage in column.run.stages if stage.search]
    return found[0][0].rope_base(found[0][1]) if found else None


def _tables(runs: Sequence[tuple[str, Results]], metric: str) -> list[Table]:
    found = [tables.by_run(runs, metric, method) for method in _METHODS]
    return [table for table in found if table is not None]


def _heat(runs: Sequence[tuple[str, Results]], metric: str) -> list[tuple[str, list[Table]]]:
    """Heat maps of the methods that depend on the run, those of all runs beside each other."""
    rows = []
    for method in _METHODS[:2]:
        found = [tables.heat_table(results, metric, method, name) for name, results in runs]
        if maps := [table for table in found if table is not None]:
            rows.append((method, maps))
    return rows


def differences(runs: Sequence[Run]) -> list[tuple[list[str], list[str]]]:
    """Settings that are not the same in all runs, those that differ in the same way together.

    Paths inside a run's own folder count as equal.

    Returns:
        Names of settings, as ``stage: key``, and their value in each run.
    """
    flat = [dict(_settings(run)) for run in runs]
    groups: dict[tuple[str, ...], list[str]] = {}
    for key in dict.fromkeys(key for settings in flat for key in settings):
        values = tuple(settings.get(key, "-") for settings in flat)
        if len(set(values)) > 1:
            groups.setdefault(values, []).append(key)
    return [(keys, list(values)) for values, keys in groups.items()]


def _settings(run: Run) -> Iterator[tuple[str, str]]:
    for stage in run.stages:
        tree = _loaded(stage.config)
        own = str(page.mapping(tree.get("trainer")).get("default_root_dir") or stage.folder)
        roots = (own, str(Path(own).parent), str(run.folder))
        for key, value in _leaves(tree):
            for root in roots if len(run.stages) > 1 else roots[::2]:
                value = _below_root(value, root)
            if not key.endswith("logger.init_args.id"):
                yield f"{stage.name}: {key}", value


def _below_root(value: str, root: str) -> str:
    """A path in a run's own folder without the name of that folder; anything else as it is."""
    root = root.rstrip("/")
    inside = root not in ("", ".") and (value == root or value.startswith(f"{root}/"))
    return f"{{out}}{value[len(root) :]}" if inside else value


def _loaded(config: str | None) -> dict[str, Any]:
    try:
        return page.mapping(parse_yaml(config or "", "config.yaml"))
    except ValueError:
        return {}


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    branches: Any = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for name, branch in branches:
        yield from _leaves(branch, f"{key}.{name}" if key else str(name))
    if not isinstance(tree, Mapping | list):
        yield key, str(tree)


def _circumstances(columns: Sequence[Column]) -> Table:
    """Machines, versions and the time of each stage, runs across."""
    about = [column.run.about for column in columns]
    versions = [page.mapping(one.get("versions")) for one in about]
    stages = [{stage.name: stage.seconds for stage in column.run.stages} for column in columns]
    rows = [(name, [str(one.get(name, "-")) for one in about]) for name in ("seed", "machine")]
    rows += [(name, [str(one.get(name, "-")) for one in versions]) for name in _names_in(versions)]
    rows += [(f"time of {name}", [seconds_text(one.get(name)) for one in stages]) for name in _names_in(stages)]
    rows.append(("time of all stages", [_time(column.run) for column in columns]))
    lines = [Line(name, None, [Cell(text) for text in texts]) for name, texts in rows]
    return Table("", [column.name for column in columns], lines)


def _names_in(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in mappings for name in one))


def _csv(runs: Sequence[tuple[str, Results]]) -> str:
    rows = [(name, *astuple(row)) for name, results in runs for row in results.rows]
    return table_text(("run", *COLUMNS), rows)
