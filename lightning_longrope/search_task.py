"""What a search is to reach: a longer window, a longer one still on top of factors, or the short window again.

    first extension     table = candidate                    baselines  PI, NTK, YaRN
    second extension    table = installed table x candidate  baselines  the same on top of the installed table
    recovery            table = candidate, small factors     baselines  no change, the installed table, PI, NTK, YaRN

A model that comes extended (Llama 3.1, YaRN and LongRoPE configs) counts as one with its table installed.

Source: LongRoPE, arXiv:2402.13753, Sections 3.3 (second extension) and 3.4 (recovery of the short window).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_longrope.factors import RescaleFactors
from lightning_longrope.geometry import rope_geometry, rope_parameters
from lightning_longrope.model import installed_factors
from lightning_longrope.rope import longrope_attention_factor
from lightning_longrope.search import Candidate, SearchSpace
from lightning_longrope.sliding import say_reach
from lightning_longrope.tables import tables_in_force

log = logging.getLogger(__name__)

FORMULAS = ("linear", "ntk", "yarn")


@dataclass(frozen=True)
class SearchTask:
    """The space of a search, and how its candidates become tables of the model.

    Attributes:
        space: What may be proposed.
        baselines: Published tables for the same task, by name.
        base: Table that candidates multiply; None where they are tables themselves.
    """

    space: SearchSpace
    baselines: dict[str, RescaleFactors]
    base: RescaleFactors | None = None

    def table(self, candidate: Candidate) -> RescaleFactors:
        """The table that a candidate stands for."""
        return _on_top(self.base, candidate.to_factors(self.space))


def search_task(
    model: Any,
    target_length: int,
    *,
    pinned: int | None = None,
    start_tokens: tuple[int, ...] | None = None,
    space: SearchSpace | Mapping[str, Any] | None = None,
    multiply: bool | None = None,
    recovery: bool = False,
    between: bool = False,
) -> SearchTask:
    """What a search on a model is to do; see ``search_factors`` for the arguments.

    With ``between``, which ``RecoverySearch`` needs, factors reach those installed and the space knows them.

    Raises:
        ValueError: If the target is within the model's window without ``recovery``, or there is nothing to multiply.
    """
    geometry, installed = rope_geometry(model.config), starting_point(model)
    if installed is not None and installed_factors(model) is None:
        log.info(
            "%s comes with %s factors: pretrained on %d tokens, extended to %d.",
            *(type(model).__name__, rope_parameters(model.config)["rope_type"]),
            *(installed.original_length, installed.target_length),
        )
    say_reach(model, target_length)
    if multiply is None:
        multiply = not recovery and installed is not None and target_length > installed.target_length
    if multiply and (installed is None or recovery):
        raise ValueError("`multiply` needs a model with factors installed to start from, and no `recovery`.")
    if not (recovery or isinstance(space, SearchSpace)) and target_length <= geometry.original_length:
        raise ValueError(
            f"`target_length` ({target_length}) must be longer than the model's own window"
            f" ({geometry.original_length} tokens); to search factors for its own window, pass `recovery`."
        )
    base = installed if multiply else None
    if not isinstance(space, SearchSpace):
        original = base.target_length if base else min(geometry.original_length, target_length)
        own = {"rotary_size": geometry.rotary_size, "base": geometry.base, "original_length": original}
        kept = base.start_tokens if base else 0
        defaults = {
            "target_length": target_length,
            "pinned": min(4, geometry.pairs // 8) if pinned is None else pinned,
            "start_tokens": (kept,) if start_tokens is None else start_tokens,
            "pretrained_length": min(geometry.original_length, target_length),
        }
        given = dict(space or {})
        if between and installed is not None:
            defaults |= {"warm_start": installed, "max_factor": max(installed.values)}
        if not given.get("attention_factors"):
            attention = _attention(geometry.original_length, target_length, installed, base, recovery)
            defaults["attention_factor"] = attention
        if isinstance(path := given.get("warm_start"), str | Path):
            given["warm_start"] = RescaleFactors.load(path, geometry.original_length)
        space = SearchSpace(**{**own, **defaults, **given})
    formulas = _formulas(space, base)
    if recovery:
        lengths = space.original_length, space.target_length
        extra = {"none": RescaleFactors((1.0,) * geometry.pairs, *lengths)}
        if installed is not None:
            extra["installed"] = RescaleFactors(
                installed.values, *lengths, installed.start_tokens, installed.attention_factor
            )
        formulas = extra if space.scale <= 1 else {**extra, **formulas}
    return SearchTask(space, formulas, base)


def starting_point(model: Any) -> RescaleFactors | None:
    """The factors installed in a model, or those with which it comes; None for a plain pretrained one."""
    installed, own = installed_factors(model), tables_in_force(model.config)
    if installed is not None:
        return None if installed.is_identity else installed
    return own.longest if own else None


def _formulas(space: SearchSpace, base: RescaleFactors | None) -> dict[str, RescaleFactors]:
    """PI, NTK and YaRN as published, off the grid and with their own attention factors."""
    shape = {name: getattr(space, name) for name in ("rotary_size", "base", "original_length", "target_length")}
    tables = {name: getattr(RescaleFactors, name)(**shape) for name in FORMULAS}
    if base is None:
        return tables
    return {f"second_{name}": table.on_top_of(base) for name, table in tables.items()}


def _on_top(base: RescaleFactors | None, table: RescaleFactors) -> RescaleFactors:
    """The product of two tables, for the window of the second; start tokens and attention factor are the second's."""
    if base is None:
        return table
    both = table.on_top_of(base)
    return replace(both, start_tokens=table.start_tokens, attention_factor=table.attention_factor)


def _attention(
    original: int, target: int, installed: RescaleFactors | None, base: RescaleFactors | None, recovery: bool
) -> float | None:
    """The attention factor of all candidates; None for that of the space.

    A model reads short texts with the attention factor it was extended with, since Hugging Face has one for both
    tables. On top of a table the factor grows as it would have from the pretrained window to the new one.
    """
    if recovery:
        return installed.attention_factor if installed else None
    if base is None:
        return None
    default = longrope_attention_factor(original_length=base.original_length, target_length=base.target_length)
    whole = longrope_attention_factor(original_length=original, target_length=target)
    return whole * base.attention_factor / default
