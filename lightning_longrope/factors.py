"""Rescale factors: the one value that searches find, models take, checkpoints keep and exports write."""

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_longrope import rope
from lightning_longrope.files import write_json, write_text
from lightning_longrope.geometry import LAYER_TYPE, config_fields, rope_geometry, rope_parameters
from lightning_longrope.reading import blaming, is_number, number, parse_json, read_text

FACTORS_FILE = "rescale_factors.json"
"""Name of our own table in an exported Hugging Face folder."""

_CHECKSUM = "crc32"


@dataclass(frozen=True)
class RescaleFactors:
    """How much each frequency pair of a rotary embedding is slowed down, and for which window.

    Values are kept as given: they have no upper bound and may decrease (a search bounds them, :meth:`load` asks for
    monotone ones).

    Raises:
        ValueError: If a value is not finite or below 1, a length does not extend the window, ``start_tokens`` is
            negative or ``attention_factor`` not positive.
    """

    values: tuple[float, ...]
    """lambda: one factor for each frequency pair, fastest pair first; 1 keeps the pretrained speed."""
    original_length: int
    """L, the pretrained window in tokens."""
    target_length: int
    """L', the window to reach in tokens."""
    start_tokens: int = 0
    """n_hat: how many first positions keep the pretrained speeds."""
    attention_factor: float = 1.0
    """Multiplier of cos and sin, so attention logits grow by its square."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        if not self.values:
            raise ValueError("Rescale factors need at least one value, got none.")
        for index, value in enumerate(self.values):
            if not (math.isfinite(value) and value >= 1):
                raise ValueError(
                    f"Rescale factors must be finite and at least 1, got {value} for frequency pair {index}."
                )
        for name in ("original_length", "target_length", "start_tokens"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be a whole number of tokens, got {getattr(self, name)!r}.")
        rope.extension_ratio(self.original_length, self.target_length)
        if self.start_tokens < 0:
            raise ValueError(f"`start_tokens` must not be negative, got {self.start_tokens}.")
        if not (math.isfinite(self.attention_factor) and self.attention_factor > 0):
            raise ValueError(f"`attention_factor` must be finite and positive, got {self.attention_factor}.")

    @classmethod
    def none(cls, *, rotary_size: int, base: float, original_length: int, target_length: int) -> "RescaleFactors":
        """No rescaling: the pretrained model as it is, extrapolating."""
        table = rope.pretrained_inv_freq(rotary_size=rotary_size, base=base)
        return cls((1.0,) * len(table), original_length, target_length)

    @classmethod
    def linear(cls, *, rotary_size: int, base: float, original_length: int, target_length: int) -> "RescaleFactors":
        """Position interpolation; see :func:`lightning_longrope.rope.linear_factors`."""
        return cls._of(rope.linear_factors, rotary_size, base, original_length, target_length)

    @classmethod
    def ntk(cls, *, rotary_size: int, base: float, original_length: int, target_length: int) -> "RescaleFactors":
        """NTK-aware interpolation; see :func:`lightning_longrope.rope.ntk_factors`."""
        return cls._of(rope.ntk_factors, rotary_size, base, original_length, target_length)

    @classmethod
    def dynamic_ntk(
        cls, *, rotary_size: int, base: float, original_length: int, target_length: int, factor: float = 1.0
    ) -> "RescaleFactors":
        """Dynamic NTK at ``target_length`` tokens; see :func:`lightning_longrope.rope.dynamic_ntk_factors`."""
        return cls._of(rope.dynamic_ntk_factors, rotary_size, base, original_length, target_length, factor=factor)

    @classmethod
    def yarn(
        cls, *, rotary_size: int, base: float, original_length: int, target_length: int, **ramp: Any
    ) -> "RescaleFactors":
        """YaRN with its attention factor; see :func:`lightning_longrope.rope.yarn_factors` for ``ramp``."""
        attention = rope.yarn_attention_factor(original_length=original_length, target_length=target_length)
        return cls._of(
            rope.yarn_factors, rotary_size, base, original_length, target_length, attention_factor=attention, **ramp
        )

    @classmethod
    def llama3(
        cls, *, rotary_size: int, base: float, original_length: int, target_length: int, **ramp: Any
    ) -> "RescaleFactors":
        """Llama 3.1's rescaling; see :func:`lightning_longrope.rope.llama3_factors` for ``ramp``."""
        return cls._of(rope.llama3_factors, rotary_size, base, original_length, target_length, **ramp)

    @classmethod
    def _of(
        cls,
        method: Callable[..., Tensor],
        rotary_size: int,
        base: float,
        original_length: int,
        target_length: int,
        *,
        attention_factor: float = 1.0,
        **own: Any,
    ) -> "RescaleFactors":
        """The factors of one of the functions in ``rope``."""
        table = method(
            rotary_size=rotary_size, base=base, original_length=original_length, target_length=target_length, **own
        )
        return cls(tuple(table.tolist()), original_length, target_length, attention_factor=attention_factor)

    @property
    def pairs(self) -> int:
        """F, the number of frequency pairs."""
        return len(self.values)

    @property
    def scale(self) -> float:
        """s, the extension ratio."""
        return self.target_length / self.original_length

    @property
    def is_identity(self) -> bool:
        """Whether a model with these factors is the pretrained model."""
        return self.start_tokens == 0 and self.attention_factor == 1 and all(value == 1 for value in self.values)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and a list, for JSON and checkpoints."""
        return {**asdict(self), "values": list(self.values)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RescaleFactors":
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: If keys are missing, unknown or hold something else than numbers.
        """
        known = {field.name for field in fields(cls)}
        missing = {"values", "original_length", "target_length"} - data.keys()
        if missing or data.keys() - known:
            raise ValueError(
                f"Rescale factors need the keys {sorted(known)}:"
                f" missing {sorted(missing)}, unknown {sorted(data.keys() - known)}."
            )
        given = [data["values"], [value for name, value in data.items() if name != "values"]]
        if not all(isinstance(part, list | tuple) and all(map(is_number, part)) for part in given):
            raise ValueError(f"Rescale factors need a list of numbers and whole lengths, got {dict(data)}.")
        return cls(**{**data, "values": tuple(data["values"])})

    def on_top_of(self, earlier: "RescaleFactors") -> "RescaleFactors":
        """These factors as a second extension: values and attention factors multiply, start tokens are the earlier's.

        Args:
            earlier: The factors of a model that reads ``original_length`` tokens of these.
        """
        return replace(
            self,
            values=tuple(one * other for one, other in zip(earlier.values, self.values, strict=True)),
            original_length=earlier.original_length,
            start_tokens=earlier.start_tokens,
            attention_factor=earlier.attention_factor * self.attention_factor,
        )

    def save(self, path: str | Path) -> None:
        """Writes the factors as JSON, in full or not at all, with a checksum that :meth:`load` compares."""
        write_entries(path, self.to_dict())

    def save_csv(self, path: str | Path) -> None:
        """Writes the values alone, one a line, as Microsoft's code reads them; the lengths are not in it."""
        write_text(path, "".join(f"{value!r}\n" for value in self.values))

    @classmethod
    def load(
        cls,
        path: str | Path,
        original_length: int | None = None,
        target_length: int | None = None,
        monotone: bool = True,
    ) -> "RescaleFactors":
        """Reads factors from our JSON, from Microsoft's CSV, or from a Hugging Face folder or ``config.json``.

        A CSV holds one value a line, or one row of values for each layer, all the same; it gets LongRoPE's attention
        factor. A Hugging Face config may have the rope types longrope, yarn, linear, dynamic, llama3 and default. Of
        several tables the one for the longest window is read; ``LengthTables.load`` reads all.

        Args:
            path: The file or folder.
            original_length: Pretrained window in tokens, where the file does not say.
            target_length: Window to reach in tokens, where the file does not say.
            monotone: Refuse factors that decrease from one pair to the next. Some published tables do.

        Raises:
            ValueError: If the file cannot be read as factors, a length is missing or contradicts the file, or a value
                is not finite, below 1 or (with ``monotone``) below the one before.
        """
        path = factors_file(path)
        with blaming(f"Cannot read rescale factors from {path}"):
            factors = _parse(read_entries(path), original_length, target_length)
        if monotone:
            check_monotone(factors.values, path)
        return factors

    @classmethod
    def of_rope_type(cls, parameters: Mapping[str, Any], config: Any) -> "RescaleFactors":
        """The factors of Hugging Face's ``rope_parameters``, such as ``{"rope_type": "linear", "factor": 8}``.

        Args:
            parameters: Rope type and its keywords; what they leave out is the model's.
            config: Config of the pretrained model.

        Raises:
            ValueError: If the rope type is unknown or does not fit the model.
        """
        geometry, own = rope_geometry(config), rope_parameters(config)
        kept = {name: own[name] for name in ("rope_theta", "partial_rotary_factor") if name in own}
        fields: dict[str, Any] = {**config_fields(config), "rope_parameters": {**kept, **parameters}}
        fields["max_position_embeddings"] = geometry.original_length
        return _from_config(fields, geometry.original_length, None)

    @classmethod
    def from_config(cls, config: Any) -> "RescaleFactors":
        """The table of a Hugging Face config's rope type, the long one of two; see :meth:`load`.

        Raises:
            ValueError: If the rope type is unknown or does not tell its window.
        """
        return _from_config(config_fields(config), None, None)

    def to_hf(self, config: Any, short: "RescaleFactors | None" = None) -> dict[str, Any]:
        """The ``rope_parameters`` that make a Hugging Face model use these factors (rope type ``longrope``).

        Hugging Face has one attention factor for both tables, which is that of the long one, and no start tokens. Where
        an attention factor is not the default formula, both are written again under the names that vLLM reads.

        Args:
            config: The model's config; its base, partial rotary factor and other layer types are kept.
            short: Table of sequences up to ``original_length``; the same table if None.

        Returns:
            Plain lists and floats. Set ``max_position_embeddings`` to ``target_length`` along with it.

        Raises:
            ValueError: If there are start tokens, or not one value for each frequency pair of the model.
        """
        pairs = rope_geometry(config).pairs
        for name, table in (("factors", self), ("short factors", short or self)):
            if table.pairs != pairs:
                raise ValueError(f"The model has {pairs} frequency pairs, but the {name} have {table.pairs} values.")
            if table.start_tokens:
                raise ValueError(
                    f"Hugging Face has no start tokens, but the {name} have start_tokens={table.start_tokens}:"
                    " search with start_tokens=(0,) or drop them."
                )
        stock = rope_parameters(config)
        parameters: dict[str, Any] = {
            "rope_type": "longrope",
            "rope_theta": float(stock["rope_theta"]),
            "long_factor": list(self.values),
            "short_factor": list((short or self).values),
            "factor": self.scale,
            "original_max_position_embeddings": self.original_length,
            "attention_factor": self.attention_factor,
        }
        if stock.get("partial_rotary_factor") is not None:
            parameters["partial_rotary_factor"] = float(stock["partial_rotary_factor"])
        default = rope.longrope_attention_factor(original_length=self.original_length, target_length=self.target_length)
        both = {"short_mscale": (short or self).attention_factor, "long_mscale": self.attention_factor}
        if not all(math.isclose(factor, default, rel_tol=1e-9) for factor in both.values()):
            parameters |= both
        nested = config_fields(config).get("rope_parameters") or {}
        return {**nested, LAYER_TYPE: parameters} if isinstance(nested.get(LAYER_TYPE), Mapping) else parameters


def factors_file(path: str | Path) -> Path:
    """The file that holds the factors of a file or of a Hugging Face folder.

    Raises:
        ValueError: If there is none.
    """
    path = Path(path)
    if path.is_dir():
        own = path / FACTORS_FILE
        path = own if own.is_file() else path / "config.json"
    if not path.is_file():
        raise ValueError(f"No rescale factors at {path}: expected a .json or .csv file or a Hugging Face folder.")
    return path


def write_entries(path: str | Path, entries: dict[str, Any]) -> None:
    """Writes factors as JSON, with a checksum: a digit that a disk has changed is a digit all the same."""
    write_json(path, {**entries, _CHECKSUM: _checksum(entries)})


def read_entries(path: Path) -> str | dict[str, Any]:
    """What a JSON file of factors says, or the text of a file that is no JSON.

    Raises:
        ValueError: If it is damaged. A file without a checksum is taken as it is.
    """
    text = read_text(path)
    if not text.lstrip().startswith("{"):
        return text
    entries: dict[str, Any] = parse_json(text, path)
    checksum = entries.pop(_CHECKSUM, None)
    if checksum is not None and checksum != _checksum(entries):
        raise ValueError(f"its `{_CHECKSUM}` does not match. It is damaged; if you have edited it, delete that entry.")
    if "tables" in entries and len(entries) > 1:
        raise ValueError(f"`tables` stand alone in a file, got the keys {sorted(entries)}.")
    return entries


def _checksum(entries: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(entries, sort_keys=True).encode()):08x}"


def _parse(data: str | dict[str, Any], original_length: int | None, target_length: int | None) -> RescaleFactors:
    """Factors from what a file says."""
    if isinstance(data, str):
        return _from_csv(data, original_length, target_length)
    table = max(data["tables"], key=lambda table: table["target_length"]) if "tables" in data else data
    if "values" not in table:
        return _from_config(table, original_length, target_length)
    factors = RescaleFactors.from_dict(table)
    _check_known("original_length", factors.original_length, original_length)
    _check_known("target_length", factors.target_length, target_length)
    return factors


def _from_csv(text: str, original_length: int | None, target_length: int | None) -> RescaleFactors:
    """Factors from one value a line or one row a layer."""
    lines = [[cell.strip(" \t\r") for cell in line.split(",")] for line in text.split("\n")]
    try:
        rows = [[number(cell) for cell in line if cell] for line in lines if any(line)]
    except ValueError as error:
        raise ValueError(f"expected numbers separated by commas or newlines; {error}.") from error
    if not rows:
        raise ValueError("the file is empty, expected numbers separated by commas or newlines.")
    if all(len(row) == 1 for row in rows):
        rows = [[row[0] for row in rows]]
    for index, row in enumerate(rows):
        if row != rows[0]:
            raise ValueError(
                f"row {index + 1} differs from row 1: one table serves all layers, so all rows must be equal."
            )
    if original_length is None or target_length is None:
        raise ValueError("a CSV does not say its lengths: give `original_length` and `target_length`.")
    attention = rope.longrope_attention_factor(original_length=original_length, target_length=target_length)
    return RescaleFactors(tuple(rows[0]), original_length, target_length, attention_factor=attention)


_SHAPES = ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
_NUMBERS = {*_SHAPES, "factor", "rope_theta", "attention_factor", "long_factor", "short_factor", "mscale"}
_NUMBERS |= {"mscale_all_dim", "original_max_position_embeddings"}


def _from_config(config: dict[str, Any], original_length: int | None, target_length: int | None) -> RescaleFactors:
    """Factors of the rope type of a Hugging Face config."""
    parameters, geometry = rope_parameters(config), rope_geometry(config)
    _check_numbers(parameters)
    kind = parameters["rope_type"]
    longest = config_fields(config).get("max_position_embeddings") or 0
    # `linear` and `dynamic` configs keep either window in max_position_embeddings
    original = original_length if kind in ("linear", "dynamic") and original_length else geometry.original_length
    factor = float(parameters.get("factor") or longest / original)
    shape: dict[str, Any] = {"rotary_size": geometry.rotary_size, "base": geometry.base, "original_length": original}
    if kind in ("longrope", "yarn", "su"):
        shape["target_length"] = round(original * factor)
    elif kind == "llama3":
        shape["target_length"] = longest if longest > original else round(original * factor)
    elif kind == "linear":
        shape["target_length"] = target_length or round(original * factor)
    elif kind == "dynamic" and target_length is None:
        raise ValueError("a `dynamic` table depends on the sequence length: give `target_length`.")
    else:
        shape["target_length"] = target_length or longest
    _check_known("original_length", original, original_length)
    _check_known("target_length", shape["target_length"], target_length)
    return _of_rope_type(kind, parameters, shape, factor, geometry.pairs)


def _check_numbers(parameters: Mapping[str, Any]) -> None:
    """Raises ValueError where a config has something else than a number, such as ``true``, which would count as 1."""
    for name in _NUMBERS & parameters.keys():
        given = parameters[name]
        if not all(map(is_number, given if isinstance(given, list | tuple) else () if given is None else [given])):
            raise ValueError(f"`{name}` must be a number, or a list of them for long and short factors, got {given!r}.")


def _of_rope_type(
    kind: str, parameters: dict[str, Any], shape: dict[str, Any], factor: float, pairs: int
) -> RescaleFactors:
    """Factors of one Hugging Face rope type with its own keywords."""
    lengths = {name: shape[name] for name in ("original_length", "target_length")}
    own = {name: parameters[name] for name in (*_SHAPES, "truncate") if parameters.get(name) is not None}
    match kind:
        case "default":
            return RescaleFactors.none(**shape)
        case "linear":
            table = RescaleFactors.linear(**shape)
            return RescaleFactors((factor,) * table.pairs, **lengths)
        case "dynamic":
            return RescaleFactors.dynamic_ntk(**shape, factor=factor)
        case "llama3":
            return RescaleFactors.llama3(**shape, factor=factor, **own)
        case "yarn":
            attention = parameters.get("attention_factor") or _mscale_attention(parameters, factor)
            table = RescaleFactors.yarn(**shape, **own)
            return RescaleFactors(table.values, **lengths, attention_factor=attention)
        case "longrope" | "su":
            attention = parameters.get("attention_factor") or rope.longrope_attention_factor(**lengths)
            values = tuple(parameters.get("long_factor") or ())
            if len(values) != pairs:
                raise ValueError(f"`long_factor` has {len(values)} values, but the model has {pairs} frequency pairs.")
            return RescaleFactors(values, **lengths, attention_factor=attention)
    raise ValueError(f"unknown rope type {kind!r}; known are default, linear, dynamic, yarn, llama3 and longrope.")


def _mscale_attention(parameters: Mapping[str, Any], factor: float) -> float:
    """YaRN's attention factor in a config that does not spell it out; DeepSeek models give two slopes for it."""
    slope, slope_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    log = math.log(max(factor, 1.0))
    return (0.1 * slope * log + 1) / (0.1 * slope_all * log + 1) if slope and slope_all else 0.1 * log + 1


def _check_known(name: str, known: int, given: int | None) -> None:
    """Refuses a length that contradicts the file."""
    if given is not None and given != known:
        raise ValueError(f"`{name}` is {known} in the file, but {given} was given: leave the argument out.")


def check_monotone(values: tuple[float, ...], path: Path) -> None:
    """Refuses factors that decrease from one pair to the next.

    Raises:
        ValueError: Naming the file and the pair.
    """
    for index, (before, after) in enumerate(zip(values, values[1:], strict=False)):
        if after < before:
            raise ValueError(
                f"The factors in {path} decrease from {before} (pair {index}) to {after} (pair {index + 1});"
                " slower pairs are expected to be slowed at least as much. Pass monotone=False if this is meant."
            )
