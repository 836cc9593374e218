"""Measures many methods of extension on the same documents and prompts, with the callbacks that measure one."""

import csv
import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_longrope.callbacks.measurement import MeasuringCallback
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.files import write_text
from lightning_longrope.metrics import Measurement
from lightning_longrope.model import install_factors, rope_geometry

log = logging.getLogger(__name__)

COLUMNS = ("method", "metric", "length", "depth", "value", "low", "high", "n")
METHODS = ("none", "linear", "ntk", "dynamic_ntk", "yarn")

TableAt = Callable[[int], RescaleFactors]
"""The factors a method uses for a sequence of some length, in tokens."""


def method_tables(method: str, config: Any, target_length: int) -> TableAt:
    """The factors of a published method for sequences of each length.

    Only ``dynamic_ntk`` depends on the length: its table is rebuilt for every sequence.

    Args:
        method: One of ``METHODS``.
        config: Hugging Face config of the model.
        target_length: Window to reach in tokens.

    Raises:
        ValueError: If there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"`methods` may hold {', '.join(METHODS)}, got {method!r}; give tables of yours in `factors`.")
    geometry = rope_geometry(config)
    shape: dict[str, Any] = {
        "rotary_size": geometry.rotary_size,
        "base": geometry.base,
        "original_length": geometry.original_length,
    }
    build = getattr(RescaleFactors, method)
    if method == "dynamic_ntk":
        return lambda length: build(**shape, target_length=max(length, geometry.original_length))
    table = build(**shape, target_length=target_length)
    return lambda length: table


class MethodComparison(Callback):
    """Runs measuring callbacks once per method, in place of a validation run's own measurements.

    Keeps the rows of every finished method in a file of its own, so a comparison that was cut measures no method
    again.

    Args:
        tables: Factors of each method at each length; None leaves the model as it was loaded.
        measuring: Callbacks that say what is measured.
        folder: Where the rows of a method are kept.
    """

    def __init__(self, tables: dict[str, TableAt | None], measuring: Sequence[MeasuringCallback], folder: Path) -> None:
        self.tables = tables
        self.measuring = measuring
        self.folder = folder

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for method, table_at in self.tables.items():
            path = self.folder / f"{method}.csv"
            # Decided together: the ranks measure a method together or not at all.
            if trainer.strategy.broadcast(path.exists()):
                continue
            rows = self._measure(method, table_at, trainer, pl_module)
            if trainer.is_global_zero:
                write_rows(path, rows)
                log.info("%s: %s", method, summary(rows))

    def _measure(
        self, method: str, table_at: TableAt | None, trainer: Trainer, module: LightningModule
    ) -> list[tuple[str, Measurement]]:
        def install(length: int) -> None:
            if table_at is not None:
                install_factors(module.model, table_at(length))

        return [(method, found) for callback in self.measuring for found in callback.measure(trainer, module, install)]


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


def write_rows(path: Path, rows: Sequence[tuple[str, Measurement]]) -> None:
    """Writes measurements of methods as a tidy CSV, one measurement a row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for method, found in rows:
        depth = "" if found.depth is None else found.depth
        writer.writerow([method, found.metric, found.length, depth, found.value, found.low, found.high, found.n])
    write_text(path, text.getvalue())


def read_rows(paths: Sequence[Path]) -> str:
    """The rows of several such files as one CSV text."""
    texts = [path.read_text(encoding="utf-8").splitlines(keepends=True) for path in paths]
    return "".join([",".join(COLUMNS) + "\n", *(line for lines in texts for line in lines[1:])])


def summary(rows: Sequence[tuple[str, Measurement]]) -> str:
    """One line: perplexity and passkey accuracy at each length."""
    wanted = ("perplexity", "passkey")
    parts = {metric: [f for _, f in rows if f.metric == metric and f.depth is None] for metric in wanted}
    return "; ".join(
        f"{metric} " + ", ".join(f"{found.length}: {found.value:.4g}" for found in values)
        for metric, values in parts.items()
        if values
    )
