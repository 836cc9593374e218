"""Measures many methods of extension on the same documents and prompts, with the callbacks that measure one."""

import csv
import hashlib
import io
import json
import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_longrope.callbacks.measurement import MeasuringCallback, TableAt
from lightning_longrope.callbacks.retrieval import RetrievalCallback
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.files import write_json, write_text
from lightning_longrope.metrics import DocumentSums, Measurement, PositionMean, paired_ratio
from lightning_longrope.model import rope_geometry
from lightning_longrope.reading import blaming, read_json_object, read_table

log = logging.getLogger(__name__)

METHODS = ("none", "linear", "ntk", "dynamic_ntk", "yarn")
SECOND = "second_"
"""What the names of methods begin with where they extend a model a second time."""


@dataclass
class MethodResults:
    """What was measured of one method.

    Attributes:
        rows: The measurements.
        positions: Mean nll by position.
        sums: Sums by document of every perplexity, by metric and length.
    """

    rows: list[Measurement] = field(default_factory=list)
    positions: list[PositionMean] = field(default_factory=list)
    sums: dict[tuple[str, int], DocumentSums] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes all of it as JSON."""
        sums = [[*key, found.nll, found.weight] for key, found in self.sums.items()]
        rows, positions = ([asdict(row) for row in part] for part in (self.rows, self.positions))
        write_json(path, {"rows": rows, "positions": positions, "sums": sums})

    @classmethod
    def load(cls, path: Path) -> "MethodResults":
        """Reads what ``save`` wrote."""
        with blaming(f"{path} does not hold measurements, delete it to measure again"):
            found = read_json_object(path)
            measured = [
                value for row in (*found["rows"], *found["positions"]) for key, value in row.items() if key != "metric"
            ]
            measured += [value for *_, n, w in found["sums"] for value in (*n, *w)]
            if bad := [value for value in measured if value is not None and type(value) not in (int, float)]:
                raise ValueError(f"expected numbers, got {bad[0]!r}")
            return cls(
                [Measurement(**row) for row in found["rows"]],
                [PositionMean(**row) for row in found["positions"]],
                {(metric, length): DocumentSums(tuple(n), tuple(w)) for metric, length, n, w in found["sums"]},
            )


def method_tables(method: str, config: Any, target_length: int, earlier: RescaleFactors | None = None) -> TableAt:
    """The factors of a published method for sequences of each length.

    Only ``dynamic_ntk`` depends on the length: its table is rebuilt for every sequence.

    Args:
        method: One of ``METHODS``.
        config: Hugging Face config of the model.
        target_length: Window to reach in tokens.
        earlier: Factors of the model for a shorter window, which those of the method multiply.

    Raises:
        ValueError: If there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"`methods` may hold {', '.join(METHODS)}, got {method!r}; give tables of yours in `factors`.")
    geometry = rope_geometry(config)
    shape: dict[str, Any] = {
        "rotary_size": geometry.rotary_size,
        "base": geometry.base,
        "original_length": earlier.target_length if earlier else geometry.original_length,
    }

    def table(length: int) -> RescaleFactors:
        found: RescaleFactors = getattr(RescaleFactors, method)(**shape, target_length=length)
        return found.on_top_of(earlier) if earlier else found

    if method == "dynamic_ntk":
        return lambda length: table(max(length, shape["original_length"]))
    fixed = table(target_length)
    return lambda length: fixed


class MethodComparison(Callback):
    """Runs measuring callbacks once per method, in place of a validation run's own measurements.

    Keeps the results of every finished method in a file of its own, so a comparison that was cut measures no method
    again.

    Args:
        tables: Factors of each method at each length; None leaves the model as it was loaded.
        measuring: Callbacks that say what is measured.
        folder: Where the results of a method are kept.
        answers: Trials of each retrieval task and length whose answers are generated and printed.
    """

    def __init__(
        self,
        tables: dict[str, TableAt | None],
        measuring: Sequence[MeasuringCallback],
        folder: Path,
        answers: int = 0,
    ) -> None:
        self.tables = tables
        self.measuring = measuring
        self.folder = folder
        self.answers = answers

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for method, table_at in self.tables.items():
            path = self.folder / f"{method}.json"
            # Decided together: the ranks measure a method together or not at all.
            if trainer.strategy.broadcast(path.exists()):
                continue
            found = self._measure(table_at, trainer, pl_module)
            if trainer.is_global_zero:
                found.save(path)
                log.info("%s: %s", method, summary(found.rows))
        if self.answers:
            self._show_answers(trainer, pl_module)

    def _measure(self, table_at: TableAt | None, trainer: Trainer, module: LightningModule) -> MethodResults:
        found = MethodResults()
        for callback in self.measuring:
            found.rows += callback.measure(trainer, module, table_at)
            found.positions += callback.positions
            found.sums |= callback.sums
        return found

    def _show_answers(self, trainer: Trainer, module: LightningModule) -> None:
        """Prints what the model writes at the end of some prompts; every rank generates the same."""
        for callback in self.measuring:
            if isinstance(callback, RetrievalCallback):
                for answer in callback.answers(trainer, module, self.answers):
                    if trainer.is_global_zero:
                        depth = "" if answer.depth is None else f", depth {answer.depth:.2f}"
                        task = f"{answer.metric}, {answer.length} tokens{depth}"
                        log.info("%s: expected %r, got %r", task, answer.expected, answer.given)


def settings_digest(parts: Sequence[object], *values: object) -> str:
    """Short name of all that decides a measurement: the settings of callbacks and datamodules, and further values.

    Settings are public attributes with plain values, as a constructor takes them.
    """
    plain = (bool, int, float, str, tuple, type(None))
    settings = [
        [type(part).__name__, {k: v for k, v in vars(part).items() if k[0] != "_" and isinstance(v, plain)}]
        for part in parts
    ]
    return hashlib.sha256(json.dumps([settings, values], default=repr, sort_keys=True).encode()).hexdigest()[:16]


def write_results(
    folder: Path,
    methods: Mapping[str, MethodResults],
    baselines: Sequence[str] = METHODS,
    beside_others: bool = False,
) -> None:
    """Writes ``results.csv`` and, where positions were measured, ``positions.csv``.

    Every perplexity of a method that is no baseline gets rows of its ratio to YaRN and to the best baseline too,
    ``perplexity_over_yarn`` and so on.

    Args:
        folder: Where to write.
        methods: What was measured, by method.
        baselines: Methods that the others are held against, of a second extension too.
        beside_others: Keep the rows that the files have of other methods.

    Raises:
        ValueError: If the rows to be kept cannot be read.
    """
    rows = [(method, row) for method, found in methods.items() for row in found.rows]
    theirs = {name: methods[name] for name in methods if name.removeprefix(SECOND) in baselines}
    for method in [name for name in methods if name not in theirs]:
        rows += [(method, row) for row in paired_rows(methods[method], theirs)]
    others: dict[str, list[list[str]]] = {"results.csv": [], "positions.csv": []}
    if beside_others:
        others = {
            name: _rows_of_others(folder / name, kind, methods)
            for name, kind in (("results.csv", Measurement), ("positions.csv", PositionMean))
        }
    _write_table(folder / "results.csv", Measurement, rows, others["results.csv"])
    positions = [(method, row) for method, found in methods.items() for row in found.positions]
    if positions or (beside_others and (folder / "positions.csv").exists()):
        _write_table(folder / "positions.csv", PositionMean, positions, others["positions.csv"])


def _rows_of_others(path: Path, kind: type, methods: Container[str]) -> list[list[str]]:
    """The cells of a table that are not about these methods; none where there is no table."""
    columns = ["method", *(column.name for column in fields(kind))]
    lines = read_table(path, columns) if path.exists() else ()
    return [[row[column] for column in columns] for _, row in lines if row["method"] not in methods]


def paired_rows(ours: MethodResults, baselines: Mapping[str, MethodResults]) -> list[Measurement]:
    """``{metric}_over_{baseline}``: ratios of perplexities on the same documents, with paired bootstrap intervals.

    Args:
        ours: The method whose perplexities are the numerators.
        baselines: The methods to choose from: YaRN and, at each length, the one with the lowest perplexity.
    """
    rows = []
    for (metric, length), sums in ours.sums.items():
        others = {name: found.sums.get((metric, length)) for name, found in baselines.items()}
        same = {name: other for name, other in others.items() if other is not None and other.weight == sums.weight}
        best = min(same, key=lambda name: sum(same[name].nll), default=None)
        for name in [name for name in same if name in ("yarn", f"{SECOND}yarn", best)]:
            ratio = paired_ratio(sums, same[name])
            rows.append(Measurement(f"{metric}_over_{name}", length, None, *ratio, n=len(sums.weight)))
    return rows


def _write_table(path: Path, kind: type, rows: Sequence[tuple[str, Any]], others: Sequence[Sequence[str]] = ()) -> None:
    """Writes measurements of methods as a tidy CSV, one a row, behind those of others; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", *(column.name for column in fields(kind))])
    writer.writerows(others)
    writer.writerows([method, *astuple(row)] for method, row in rows)
    write_text(path, text.getvalue())


def summary(rows: Sequence[Measurement]) -> str:
    """One line: every perplexity and accuracy that was measured, by length."""
    parts = {row.metric: [f for f in rows if f.metric == row.metric and f.depth is None] for row in rows}
    return "; ".join(
        f"{metric} " + ", ".join(f"{found.length}: {found.value:.4g}" for found in values)
        for metric, values in parts.items()
        if values and metric != "bits_per_byte" and not metric.startswith("perplexity_last")
    )
