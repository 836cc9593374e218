"""One table for each range of lengths: a model reads every sequence with the table made for its length.

With tables for 4k, 32k and 256k tokens::

    sequence of    1 ... 4k    4k + 1 ... 32k    32k + 1 ... 256k    longer
    is read with      4k             32k               256k           256k

A table made for a long window costs quality on short sequences; one made for a short window fails on long ones.

Source: LongRoPE, arXiv:2402.13753, Section 3.4.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_longrope.factors import RescaleFactors, check_monotone, factors_file, read_entries, write_entries
from lightning_longrope.geometry import config_fields, rope_parameters
from lightning_longrope.reading import blaming

PRETRAINED = "none"
"""In place of a file: no rescaling within the pretrained window."""


@dataclass(frozen=True)
class LengthTables:
    """Rescale factors by length, each with its own start tokens and attention factor.

    A sequence is read with the first table whose ``target_length`` holds it, and with the longest where none does.

    Raises:
        ValueError: If there is no table, two are for the same length, or their numbers of pairs differ.
    """

    tables: tuple[RescaleFactors, ...]
    """Sorted by ``target_length``, in whatever order they are given."""

    def __post_init__(self) -> None:
        tables = tuple(sorted(self.tables, key=lambda table: table.target_length))
        object.__setattr__(self, "tables", tables)
        if not tables:
            raise ValueError("A model needs at least one table of rescale factors, got none.")
        if len({table.pairs for table in tables}) > 1:
            raise ValueError(
                f"Tables of one model need as many values each, got {[table.pairs for table in tables]}:"
                " they belong to different models."
            )
        lengths = [table.target_length for table in tables]
        if len(set(lengths)) < len(lengths):
            raise ValueError(f"Every table needs a `target_length` of its own, got {lengths}.")

    @classmethod
    def of(cls, factors: "RescaleFactors | LengthTables | Iterable[RescaleFactors]") -> "LengthTables":
        """Tables from one table, several, or tables, which are returned as they are."""
        if isinstance(factors, LengthTables):
            return factors
        return cls((factors,) if isinstance(factors, RescaleFactors) else tuple(factors))

    @property
    def longest(self) -> RescaleFactors:
        """The table of the whole window."""
        return self.tables[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """The longest sequence of each table in tokens, rising."""
        return tuple(table.target_length for table in self.tables)

    @property
    def is_identity(self) -> bool:
        """Whether a model with these tables is the pretrained model."""
        return all(table.is_identity for table in self.tables)

    def for_length(self, length: int) -> RescaleFactors:
        """The table that a sequence of ``length`` tokens is read with."""
        return next((table for table in self.tables if length <= table.target_length), self.longest)

    def with_pretrained(self) -> "LengthTables":
        """These tables, and none at all for sequences within the pretrained window.

        A model that was not tuned gives its pretrained logits there, bit for bit. Tables for such lengths are left out.
        """
        window = self.longest.original_length
        own = RescaleFactors((1.0,) * self.longest.pairs, window, window)
        return LengthTables((own, *(table for table in self.tables if table.target_length > window)))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; a single table is written as :meth:`RescaleFactors.to_dict` writes it."""
        written = [table.to_dict() for table in self.tables]
        return written[0] if len(written) == 1 else {"tables": written}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LengthTables":
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: If a table is not one; see :meth:`RescaleFactors.from_dict`.
        """
        return cls(tuple(RescaleFactors.from_dict(table) for table in data.get("tables", [data])))

    def save(self, path: str | Path) -> None:
        """Writes the tables as one JSON file, in full or not at all."""
        write_entries(path, self.to_dict())

    @classmethod
    def load(cls, *paths: str | Path, monotone: bool = True) -> "LengthTables":
        """Reads the tables of one or more files or Hugging Face folders, as :meth:`RescaleFactors.load` takes them.

        A Hugging Face config of rope type ``longrope`` gives its short table too where that differs from the long one.

        Args:
            paths: Files or folders; their tables are put together. ``none`` among several stands for the pretrained
                RoPE within its window.
            monotone: Refuse factors that decrease from one pair to the next.

        Raises:
            ValueError: If a file cannot be read as factors, or the tables do not belong together.
        """
        files = [path for path in paths if path != PRETRAINED]
        found = tuple(table for path in files for table in _tables_in(Path(path), monotone))
        with blaming(f"Cannot use the rescale factors of {', '.join(map(str, files))}"):
            tables = cls(found)
        return tables.with_pretrained() if len(files) < len(paths) else tables


def _tables_in(path: Path, monotone: bool) -> list[RescaleFactors]:
    """All tables of one file or folder, the longest last."""
    longest = RescaleFactors.load(path, monotone=monotone)
    path = factors_file(path)
    with blaming(f"Cannot read rescale factors from {path}"):
        data = read_entries(path)
        if isinstance(data, str) or "values" in data:
            return [longest]
        tables = list(LengthTables.from_dict(data).tables) if "tables" in data else _of_config(data, longest)
    for table in tables if monotone else ():
        check_monotone(table.values, path)
    return tables


def tables_in_force(config: Any) -> LengthTables | None:
    """The tables with which a model comes, if it was extended before: Llama 3.1, YaRN and LongRoPE models.

    ``linear`` and ``dynamic`` configs do not say from which window they extend, so nothing is told of them.

    Args:
        config: A Hugging Face config object, or the dict of a ``config.json``.
    """
    try:
        kind = rope_parameters(config)["rope_type"]
    except ValueError:  # no rotary embedding
        return None
    if kind not in ("llama3", "yarn", "longrope", "su"):
        return None
    return LengthTables(tuple(_of_config(config_fields(config), RescaleFactors.from_config(config))))


def _of_config(config: Mapping[str, Any], longest: RescaleFactors) -> list[RescaleFactors]:
    """The table of a Hugging Face config, after its short one where that differs."""
    short = rope_parameters(config).get("short_factor")
    if short is None or tuple(short) == longest.values:
        return [longest]
    return [replace(longest, values=tuple(short), target_length=longest.original_length), longest]
