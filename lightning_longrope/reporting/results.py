"""The measurements of a run: one tidy table, read from the stages' ``eval/results.csv`` and joined."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from lightning_longrope.reading import number, read_table, whole
from lightning_longrope.reporting.names import ACCURACIES, method_order


@dataclass(frozen=True)
class Result:
    """One measurement, a row of ``results.csv``."""

    method: str
    """What the model's positions were: none, linear, ntk, dynamic_ntk, yarn, searched, tuned, ..."""
    metric: str
    length: int
    """Tokens read."""
    depth: float | None
    """Where in the prompt the answer stands, 0 the beginning and 1 the end; None for the mean over depths."""
    value: float
    low: float | None
    """Lower end of the 95 % interval, with ``high`` the upper one; None where it was not measured."""
    high: float | None
    n: int | None
    """Documents or trials."""


COLUMNS = tuple(field.name for field in fields(Result))


class Results:
    """Measurements by method, metric, length and depth."""

    def __init__(self, rows: Iterable[Result] = ()) -> None:
        self._rows = {(row.method, row.metric, row.length, row.depth): row for row in rows}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[Result]:
        """All measurements in reading order: by metric, method, length and depth, means after their depths."""
        order = {metric: place for place, metric in enumerate(self.metrics)}
        return sorted(
            self._rows.values(),
            key=lambda row: (
                order[row.metric],
                method_order(row.method),
                row.length,
                math.inf if row.depth is None else row.depth,
            ),
        )

    @property
    def metrics(self) -> list[str]:
        """Metrics in the order in which they were first measured."""
        return list(dict.fromkeys(row.metric for row in self._rows.values()))

    def get(self, method: str, metric: str, length: int, depth: float | None = None) -> Result | None:
        """One measurement, or None."""
        return self._rows.get((method, metric, length, depth))

    def methods(self, metric: str) -> list[str]:
        """Methods of which ``metric`` was measured, in display order."""
        return sorted({row.method for row in self._rows.values() if row.metric == metric}, key=method_order)

    def lengths(self, metric: str) -> list[int]:
        """Lengths at which ``metric`` was measured, ascending."""
        return sorted({row.length for row in self._rows.values() if row.metric == metric})

    def depths(self, metric: str) -> list[float]:
        """Depths at which ``metric`` was measured, from the beginning of the prompt to its end."""
        found = {row.depth for row in self._rows.values() if row.metric == metric}
        return sorted(depth for depth in found if depth is not None)


def read_results(path: Path) -> list[Result]:
    """Reads one ``results.csv``.

    Raises:
        ValueError: If columns are missing, or a row holds something else than numbers where numbers belong.
    """
    rows = []
    for line, row in read_table(path, COLUMNS):
        try:
            rows.append(_result(row))
        except ValueError as error:
            raise ValueError(
                f"`{path}` line {line} is not a measurement ({error}): measure again, or delete the line."
            ) from error
    return rows


def _result(row: dict[str, str]) -> Result:
    if not row["method"] or not row["metric"]:
        raise ValueError("method and metric must not be empty")
    depth, low, high = (number(row[name]) if row[name] else None for name in ("depth", "low", "high"))
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"a depth is between 0 and 1, got {depth}")
    if (length := whole(row["length"])) < 1:
        raise ValueError(f"a length is at least 1 token, got {length}")
    trials = whole(row["n"]) if row["n"] else None
    return Result(row["method"], row["metric"], length, depth, number(row["value"]), low, high, trials)


def join_results(stages: Sequence[Sequence[Result]]) -> tuple[Results, int]:
    """One table of all stages; where two stages measured the same thing the later one counts.

    Accuracies measured by depth only get their mean over depths: successes and trials summed, Wilson interval.

    Returns:
        The table, and how many measurements a later stage replaced by another value.
    """
    joined: dict[tuple[object, ...], Result] = {}
    replaced = 0
    for row in (row for stage in stages for row in stage):
        key = (row.method, row.metric, row.length, row.depth)
        replaced += key in joined and joined[key].value != row.value
        joined[key] = row
    return Results([*joined.values(), *_depth_means(Results(joined.values()))]), replaced


def _depth_means(results: Results) -> list[Result]:
    """Means over depths that no stage wrote."""
    groups: dict[tuple[str, str, int], list[Result]] = {}
    for row in results.rows:
        if row.metric in ACCURACIES and row.depth is not None:
            groups.setdefault((row.method, row.metric, row.length), []).append(row)
    return [_pooled(rows) for key, rows in groups.items() if results.get(*key) is None and all(row.n for row in rows)]


def _pooled(rows: list[Result]) -> Result:
    from lightning_longrope.retrieval import wilson_interval  # imports torch

    trials = sum(row.n or 0 for row in rows)
    successes = round(sum(row.value * (row.n or 0) for row in rows))
    low, high = wilson_interval(successes, trials)
    first = rows[0]
    return Result(first.method, first.metric, first.length, None, successes / trials, low, high, trials)


def table_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A CSV; None is an empty cell, floats keep all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def results_text(results: Results) -> str:
    """Measurements as the text of a ``results.csv``."""
    return table_text(COLUMNS, (astuple(row) for row in results.rows))
