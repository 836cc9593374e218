"""Generation with a key-value cache that stays right when a sequence outgrows its table.

What a cache holds was computed with the table for the length so far. All of it, values too, depends on that table from
the second layer on, so turning the cached keys is not enough: where a row of the batch goes on with another table, the
cache is computed again from the tokens, once. Without that step a cached model and one without a cache part ways.

Assisted decoding checks a whole draft at once, with the table for its end.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from lightning_longrope.rotary import RescaledRotary

CACHE = ("cache", "past_key_values")
"""What transformers calls a key-value cache: from 5.24 on, and before."""


def follow_tables(model: PreTrainedModel) -> None:
    """Lets ``model.generate`` compute its cache again where a sequence goes on with another table.

    Args:
        model: A Hugging Face causal language model with its rotary module installed; with one table nothing changes.
    """
    hook = "prepare_inputs_for_generation"
    rotary = model.get_decoder().rotary_emb
    if isinstance(rotary, RescaledRotary) and rotary.chosen(torch.ones(1, dtype=torch.int64)) is not None:
        setattr(model, hook, partial(_prepare_inputs, model))
    elif isinstance(vars(model).get(hook), partial):
        delattr(model, hook)


def _prepare_inputs(
    model: PreTrainedModel, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The model's own ``prepare_inputs_for_generation``, with an empty cache and all tokens where the table changes.

    Args:
        model: The model that generates.
        input_ids: All tokens so far, or those that the cache does not hold, [B, S] int64.
        next_sequence_length: How many of them are new to the cache; all if None.
        kwargs: Further inputs; rows are as long as their last position says, so padding on the left does not count.
    """
    cache, rotary = next((kwargs[name] for name in CACHE if name in kwargs), None), model.get_decoder().rotary_emb
    lengths = _lengths(input_ids, kwargs.get("position_ids"), kwargs.get("attention_mask"))
    chosen = rotary.chosen(lengths) if isinstance(rotary, RescaledRotary) else None
    if cache is not None and chosen is not None:
        new = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
        held = getattr(cache, "longrope_tables", None) or rotary.chosen(lengths - new).tolist()
        if cache.get_seq_length() > 0 and held != chosen.tolist():
            _check_whole(input_ids, int(lengths.max()))
            _empty(cache, model)
            next_sequence_length = None
        cache.longrope_tables = chosen.tolist()
    prepare: Any = type(model).prepare_inputs_for_generation
    return prepare(model, input_ids, next_sequence_length=next_sequence_length, **kwargs)


def _lengths(input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Tokens of every row with those that the cache holds, [B] or [1] int64."""
    if position_ids is not None:
        return position_ids[:, -1] + 1
    if attention_mask is not None:
        return attention_mask.sum(-1)
    return torch.full((1,), input_ids.shape[1], device=input_ids.device)


def _check_whole(input_ids: Tensor, length: int) -> None:
    """Refuses to compute a cache again from a part of the tokens."""
    if input_ids.shape[1] < length:
        raise ValueError(
            f"The sequence goes on with another table at {length} tokens, so its cache must be computed again, but only"
            f" the last {input_ids.shape[1]} tokens are known: give `generate` all tokens at once, or call it inside"
            " `lightning_longrope.model.table_for(model, length)` with the final length."
        )


def _empty(cache: Cache, model: PreTrainedModel) -> None:
    """Empties a cache in place, so that whoever has it keeps the right one."""
    if type(cache) is DynamicCache:
        cache.layers = DynamicCache(config=model.config).layers  # before transformers 5.23, reset() keeps the length
    else:
        cache.reset()
    if cache.get_seq_length() > 0:
        raise ValueError(
            f"The sequence goes on with another table, but a {type(cache).__name__} cannot be emptied to be computed"
            " again: generate with a DynamicCache, or inside `lightning_longrope.model.table_for(model, length)`."
        )
