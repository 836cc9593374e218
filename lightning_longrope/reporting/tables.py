"""Measurements as tables of a page: every cell with its interval and what it was measured on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_longrope.reporting.names import (
    ACCURACIES,
    length_text,
    look,
    method_name,
    metric_name,
    percent_text,
    points_word,
    run_slot,
    split_ratio,
    value_text,
)
from lightning_longrope.reporting.results import Result, Results
from lightning_longrope.reporting.verdict import Comparison, Outcome, ratio_outcome


@dataclass(frozen=True)
class Cell:
    """One measurement in a table."""

    text: str
    ends: tuple[str, str] | None = None
    """The 95 % interval."""
    title: str = ""
    best: bool = False
    """The best of its column among the methods on the same weights."""
    heat: float | None = None
    """Depth of the colour behind it, in [0, 1]."""
    outcome: Outcome = "unknown"
    """Of a ratio: is it better or worse than 1 beyond the noise?"""


@dataclass(frozen=True)
class Line:
    """A row of a table, with the colour that its method or run has in the figures."""

    name: str
    slot: int | None
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """Measurements by length (columns) and by method or depth (rows)."""

    name: str
    lengths: list[str]
    lines: list[Line]


def by_length(results: Results, metric: str) -> Table:
    """Means over depths of a metric, methods down and lengths across."""
    lengths = sorted({row.length for row in results.rows if row.metric == metric and row.depth is None})
    lines = []
    for method in results.methods(metric):
        rows = [results.get(method, metric, length) for length in lengths]
        cells = [cell(row, _best_value(results, row)) for row in rows]
        lines.append(Line(method_name(method), look(method).slot, cells))
    return Table(metric_name(metric), [length_text(length) for length in lengths], lines)


def by_run(runs: Sequence[tuple[str, Results]], metric: str, method: str) -> Table | None:
    """One method of several runs by length, runs down; None if no run measured it."""
    rows = [[row for row in results.rows if _is_mean(row, metric, method)] for _, results in runs]
    lengths = sorted({row.length for found in rows for row in found})
    lines = []
    for number, ((name, results), found) in enumerate(zip(runs, rows, strict=True)):
        if found:
            cells = [cell(results.get(method, metric, length)) for length in lengths]
            lines.append(Line(name, run_slot(number), cells))
    title = f"{metric_name(metric)}, {method_name(method)}"
    return Table(title, [length_text(length) for length in lengths], lines) if lines else None


def _is_mean(row: Result, metric: str, method: str) -> bool:
    return (row.metric, row.method, row.depth) == (metric, method, None)


def against_baselines(results: Results, metric: str) -> Table | None:
    """``metric`` against that of baselines on the same documents, with paired intervals; None if not measured."""
    found = {name: split_ratio(name) for name in results.metrics}
    names = [name for name, ratio in found.items() if ratio and ratio[0] == metric]
    lengths = sorted({length for name in names for length in results.lengths(name)})
    lines = []
    for name in sorted(names, key=lambda name: -len(results.lengths(name))):  # those with gaps last
        baseline = method_name((found[name] or ("", ""))[1])
        for method in results.methods(name):
            cells = [ratio_cell(results.get(method, name, length)) for length in lengths]
            lines.append(Line(f"{method_name(method)} against {baseline}", look(method).slot, cells))
    title = f"{metric_name(metric)} against the formulas, document by document"
    return Table(title, [length_text(length) for length in lengths], lines) if lines else None


def ratio_cell(row: Result | None) -> Cell:
    """A ratio as a change in per cent, marked as better or worse than 1."""
    if row is None:
        return Cell("")
    ends = None if row.low is None or row.high is None else (percent_text(row.low - 1), percent_text(row.high - 1))
    title = f"ratio {row.value:.4f}, {row.n} documents" if row.n else f"ratio {row.value:.4f}"
    return Cell(f"{percent_text(row.value - 1)}\u00a0%", ends, title, outcome=ratio_outcome(row))


def change_cell(claim: Comparison) -> Cell:
    """A comparison as a change: in per cent, of accuracies in points."""
    if math.isnan(claim.change):
        return Cell("no finite loss", outcome=claim.outcome)
    unit, digits = (points_word(claim.change), 0) if claim.ours.metric in ACCURACIES else ("%", 1)
    known = claim.low is not None and claim.high is not None
    ends = (percent_text(claim.low or 0, digits), percent_text(claim.high or 0, digits)) if known else None
    title = "document by document" if claim.paired else "as if on different documents"
    return Cell(f"{percent_text(claim.change, digits)}\u00a0{unit}", ends, title, outcome=claim.outcome)


def _group(method: str) -> str:
    """Methods that work on the same weights are compared; tuned models are weights of their own."""
    if method == "short":  # a table of the last tuned model
        return "tuned"
    return method if method.startswith("tuned") else method.partition("_")[0] if method.startswith("second_") else ""


def _best_value(results: Results, row: Result | None) -> float | None:
    """The best value of the row's group at its length, where there is something to choose from."""
    if row is None:
        return None
    methods = [method for method in results.methods(row.metric) if _group(method) == _group(row.method)]
    found = [results.get(method, row.metric, row.length) for method in methods]
    values = [other.value for other in found if other and math.isfinite(other.value)]
    if len(values) < 2 or min(values) == max(values):
        return None
    return max(values) if row.metric in ACCURACIES else min(values)


def cell(row: Result | None, best: float | None = None) -> Cell:
    """A measurement with its interval; bold where it is ``best``."""
    if row is None:
        return Cell("")
    ends = None if row.low is None else (_number(row.metric, row.low), _number(row.metric, row.high))
    count = "" if row.n is None else f"{row.n} {'trials' if row.metric in ACCURACIES else 'documents'}"
    interval = f"95\u00a0% interval {ends[0]} to {ends[1]}" if ends else "no interval"
    return Cell(value_text(row.metric, row.value), ends, f"{interval}, {count}".rstrip(", "), best=row.value == best)


def _number(metric: str, value: float | None) -> str:
    return value_text(metric, value).removesuffix("\u00a0%")


def heat_tables(results: Results, metric: str) -> list[Table]:
    """A table of depths and lengths for each method that was measured by depth; none where no answer was right."""
    if not any(row.value for row in results.rows if row.metric == metric):
        return []
    found = [heat_table(results, metric, method, method_name(method)) for method in results.methods(metric)]
    return [table for table in found if table is not None]


def heat_table(results: Results, metric: str, method: str, name: str) -> Table | None:
    """Depths down and lengths across, with colours; None if the method was not measured by depth."""
    depths, lengths = results.depths(metric), results.lengths(metric)
    cells = [[_heat_cell(results.get(method, metric, length, depth)) for length in lengths] for depth in depths]
    lines = [Line(f"{100 * depth:.3g} %", None, row) for depth, row in zip(depths, cells, strict=True)]
    known = any(one.text for row in cells for one in row)
    return Table(name, [length_text(length) for length in lengths], lines) if known else None


def _heat_cell(row: Result | None) -> Cell:
    if row is None:
        return Cell("")
    plain = cell(row)
    return Cell(_number(row.metric, row.value), title=f"{plain.text}, {plain.title}", heat=min(max(row.value, 0), 1))
