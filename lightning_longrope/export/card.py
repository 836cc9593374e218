"""The README.md of an exported folder: lengths, tables, results, what is lost, commands and licence."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_longrope import __version__
from lightning_longrope.export.lost import Loss
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.reading import read_text
from lightning_longrope.redaction import redact
from lightning_longrope.reporting.names import length_text, method_name, metric_name, value_text
from lightning_longrope.reporting.results import Results
from lightning_longrope.reporting.run_folder import Run, config_of, read_run
from lightning_longrope.tables import LengthTables

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where an exported model comes from, as far as is known."""

    base: str | None = None
    """Hugging Face name or folder of the model that was extended."""
    license: str | None = None
    """Licence of the base model, as Hugging Face names it."""
    results: Results = field(default_factory=Results)
    commands: tuple[str, ...] = ()
    """Command lines that made it, in order."""


def origin_of(checkpoint: Path, *commands: str) -> Origin:
    """What the run around a checkpoint says about where the model comes from.

    Args:
        checkpoint: A checkpoint in a run's folder, or anything else, of which nothing is known.
        commands: Command lines that come after those of the run.
    """
    folders = [folder for folder in checkpoint.absolute().parents[:3] if (folder / "run.json").is_file()]
    folders += [folder for folder in checkpoint.absolute().parents[1:2] if (folder / "config.yaml").is_file()]
    run = _run(folders[0]) if folders else None
    made = [str(run.about["command"])] if run and run.about.get("command") else []
    base = _base(run) if run else None
    results = run.results if run else Results()
    return Origin(base, base and license_of(base), results, tuple(redact(line) for line in (*made, *commands)))


def license_of(base: str) -> str | None:
    """Licence in the README of a model folder, or of a hub model that was downloaded before; None if not found."""
    path = Path(base) / "README.md"
    if not path.is_file():
        try:
            cached = try_to_load_from_cache(base, "README.md")
        except HFValidationError:
            return None
        path = Path(cached) if isinstance(cached, str) else path
    text = read_text(path) if path.is_file() else ""
    head = re.match(r"---\n.*?^---$", text, flags=re.DOTALL | re.MULTILINE)
    found = re.search(r"^license: *([\w.-]+)$", head[0], flags=re.MULTILINE) if head else None
    return found[1] if found else None


def model_card(
    name: str, config: Any, tables: LengthTables, losses: Sequence[Loss], custom_code: bool, origin: Origin
) -> str:
    """The text of the card.

    Args:
        name: Name of the folder.
        config: Config of the model's language part.
        tables: Tables of the model.
        losses: What Hugging Face cannot say of them.
        custom_code: Whether code in the folder says it.
        origin: Where the model comes from.
    """
    environment = Environment(
        loader=PackageLoader("lightning_longrope", "export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    versions = {"lightning_longrope": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return environment.get_template("card.md.j2").render(
        name=name,
        base_id=origin.base if origin.base and _is_hub_name(origin.base) else None,
        model_type=config.model_type,
        window=tables.longest.original_length,
        target=tables.longest.target_length,
        tables=tables.tables,
        two_tables=len(tables.tables) > 1,
        shape=_shape,
        losses=losses,
        custom_code=custom_code,
        origin=origin,
        results=list(_results(origin.results)),
        versions=versions,
    )


def _is_hub_name(name: str) -> bool:
    """Whether a model's name is one of the hub rather than a folder here, which may look the same."""
    return re.fullmatch(r"[^\W.][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def _shape(table: RescaleFactors) -> str:
    """A table in a few words."""
    if table.is_identity:
        return "none: the pretrained embedding"
    values = table.values
    return ", ".join(f"{values[round(i * (len(values) - 1) / 4)]:.4g}" for i in range(5))


def _results(results: Results) -> Iterator[tuple[str, list[str], list[tuple[str, list[str]]]]]:
    """A table for each metric: its name, its lengths, and the values of each method, means over depths."""
    for metric in results.metrics:
        lengths = results.lengths(metric)
        rows = []
        for method in results.methods(metric):
            found = [results.get(method, metric, length) for length in lengths]
            rows.append((method_name(method), [value_text(metric, row.value if row else None) for row in found]))
        yield metric_name(metric), [length_text(length) for length in lengths], rows


def _run(folder: Path) -> Run | None:
    try:
        return read_run(folder)
    except ValueError as error:
        log.warning("The model card is without results: %s", error)
        return None


def _base(run: Run) -> str | None:
    """The model that the run's first stage loads, if that is none of the run's own checkpoints."""
    for stage in run.stages:
        config = config_of(stage)
        model = config.get("model") if isinstance(config, dict) else None
        if isinstance(model, dict):
            name = (model.get("init_args") or model).get("name_or_path")
            return None if not name or str(name).endswith(".ckpt") else str(name)
    return None
