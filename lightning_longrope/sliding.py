"""Layers that see only the last tokens: rescaling their positions extends nothing.

A layer with a sliding window of W tokens never compares two that are W apart, whatever its table. Where all layers have
one (Mistral 7B v0.1, Phi-3), a longer window needs it lifted; where some have (Gemma, GPT-OSS), the others reach it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_longrope.geometry import config_fields

log = logging.getLogger(__name__)

_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class SlidingWindow:
    """The sliding window of a model."""

    length: int
    """W, how many tokens a layer with it sees."""
    layers: int
    """How many layers have it."""
    of: int
    """Number of layers."""
    own_rope: bool
    """Whether these layers have a rotary embedding of their own, which is never rescaled (Gemma 3)."""


def sliding_window(config: Any) -> SlidingWindow | None:
    """The sliding window of a model; None where every layer sees everything.

    Args:
        config: A Hugging Face config object, or the dict of a ``config.json``.
    """
    names = ("sliding_window", "num_hidden_layers", "use_sliding_window", "layer_types", "rope_parameters")
    length, layers, switch, types, parameters = _read(config, names)
    if not length or switch is False:
        return None
    layers = int(layers or 0)
    count = types.count(_SLIDING) if types else layers
    if not count:
        return None
    nested = isinstance((parameters or {}).get(_SLIDING), Mapping)
    return SlidingWindow(int(length), count, layers, nested)


def _read(config: Any, names: tuple[str, ...]) -> list[Any]:
    """Fields of the language model; of a config object without a copy of all, since every forward pass asks."""
    if isinstance(config, Mapping):
        fields = config_fields(config)
        return [fields.get(name) for name in names]
    config = config.get_text_config()
    return [getattr(config, name, None) for name in names]


def slides_everywhere(config: Any) -> bool:
    """Whether no layer of a model sees all tokens."""
    found = sliding_window(config)
    return found is not None and found.layers == found.of


def say_reach(model: Any, target_length: int) -> None:
    """Says, once for a model and length, which layers a longer window does not reach.

    Args:
        model: The causal language model.
        target_length: Window to reach in tokens.
    """
    found = sliding_window(model.config)
    if found is None or found.length >= target_length or getattr(model, "said_reach", None) == target_length:
        return
    model.said_reach = target_length
    name = type(model).__name__
    if found.layers == found.of:
        log.warning(
            "All %d layers of %s see only the last %d tokens, so factors for %d tokens extend nothing:"
            " set `model.original_length` to the window that was pretrained, which lifts that, or call"
            " lightning_longrope.sliding.lift_sliding_window(model).",
            *(found.of, name, found.length, target_length),
        )
    else:
        own = "keep a rotary embedding of their own" if found.own_rope else "share the rotary table and lose nothing"
        log.info(
            "%d of %d layers of %s see only the last %d tokens and %s; the others reach %d tokens.",
            *(found.layers, found.of, name, found.length, own, target_length),
        )


def lift_sliding_window(model: Any) -> None:
    """Lets every layer of a model see all tokens, in place; its config says so too. Such a model wants tuning.

    Args:
        model: A Hugging Face causal language model.

    Raises:
        ValueError: If its sliding layers have a rotary embedding of their own, which was made for short distances.
    """
    found = sliding_window(model.config)
    if found is None:
        return
    if found.own_rope:
        raise ValueError(
            f"The sliding window of {type(model).__name__} cannot be lifted: {found.layers} of its {found.of} layers"
            " have a rotary embedding of their own for short distances. They need no extension."
        )
    for config in {id(part): part for part in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "layer_types", None):
            config.layer_types = [_FULL if kind == _SLIDING else kind for kind in config.layer_types]
        elif getattr(config, "sliding_window", None):
            config.sliding_window = None
        if getattr(config, "use_sliding_window", False):
            config.use_sliding_window = False
    for module in model.modules():
        if isinstance(vars(module).get("sliding_window"), int):
            module.sliding_window = None
        for name in ("attention_type", "layer_type"):
            if vars(module).get(name) == _SLIDING:
                setattr(module, name, _FULL)
    log.info("The sliding window of %d tokens is lifted: all %d layers see all tokens.", found.length, found.of)
