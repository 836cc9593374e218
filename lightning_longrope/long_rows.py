"""Forward passes of very long rows without gradients, in parts, so that few copies of a whole row exist at once.

Hugging Face's layers compute each step for all tokens: norms in float32, an MLP several times as wide as the model, and
every head's queries, keys and values with what their rotation needs. In parts, with the same numbers:

    norms, MLPs, the attention's output    some tokens at a time, into one tensor
    attention, its projections and all     some heads at a time, key heads with the query heads that read them

Of Llama-2 7B at 2,097,152 tokens in bfloat16 there are then 82 GiB beside 12.6 of weights, which a card of 141 GB holds
(131 GiB); in whole steps there are 194. Five rows of hidden states take 16 GiB each: the embedded tokens, which the
decoder holds on to, the stream from layer to layer, its norm, what the heads give and what the layer makes of that.

Shapes: B rows, S tokens of a row, H hidden size, N query heads, D head size.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_longrope.attention import heads_at_a_time
from lightning_longrope.layers import decoder_layers
from lightning_longrope.levers import LONG_PASS, QUERIES_AT_A_TIME
from lightning_longrope.memory import mlp_of, norms_of

TOKENS = LONG_PASS
"""Tokens of a forward pass beyond which it goes in parts."""

TILE = 16_384
"""Tokens that go through a norm, an MLP or an output projection at a time."""

GROUP = QUERIES_AT_A_TIME
"""Most elements of the queries of heads that attend at a time: 2 GiB in a half type."""

_WHOLE = ("cache", "past_key_values", "row_group", "attention_mask")  # what an attention layer is given with all heads

_FEW = 16  # tokens that prove that heads in groups are right


@contextmanager
def in_parts(model: Any, tokens: int) -> Iterator[None]:
    """Lets the forward passes inside go in parts, where they are long and need no gradient, and leaves no trace.

    Args:
        model: A Hugging Face causal language model.
        tokens: Tokens of a forward pass on this device, B x S.
    """
    if torch.is_grad_enabled() or tokens <= TOKENS:
        yield
        return
    given: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in _forwards(model):
            given.append((module, vars(module).get("forward")))
            module.forward = forward
        yield
    finally:
        for module, forward in given:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _forwards(model: Any) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Modules that work in parts, and how; none where ZeRO-3 gathers weights at each call, which all must join."""
    layers = decoder_layers(model)
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        return
    for parent in (model.base_model, *layers):
        for norm in norms_of(parent):
            yield norm, partial(by_tokens, norm.forward)
    for layer in layers:
        if (mlp := mlp_of(layer)) is not None:
            yield mlp, partial(by_tokens, mlp.forward)
        attention = getattr(layer, "self_attn", None)
        if isinstance(attention, nn.Module) and _has_plain_heads(attention):
            yield attention, partial(by_heads, attention, attention.forward)


def by_tokens(forward: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """What a module that works on each token alone gives, some tokens at a time.

    Args:
        forward: The module.
        hidden: Hidden states, [B, S, C].

    Returns:
        [B, S, C'], or anything that is not hidden states, from a single call.
    """
    tokens = hidden.reshape(1, -1, hidden.shape[-1])
    parts = tokens.split(TILE, dim=1)
    first = forward(parts[0])
    if not isinstance(first, Tensor) or first.shape[:-1] != parts[0].shape[:-1]:
        return forward(hidden)
    output = first.new_empty(*tokens.shape[:-1], first.shape[-1])
    spaces = output.split(TILE, dim=1)
    spaces[0].copy_(first)
    for space, part in zip(spaces[1:], parts[1:], strict=True):
        space.copy_(forward(part))
    return output.view(*hidden.shape[:-1], -1)


def by_heads(module: Any, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What an attention layer gives, some heads at a time where all queries are too large.

    The layer must give the same both ways for a few tokens; else it stays whole.

    Args:
        module: The layer, with projections of heads that are plain.
        forward: How it computes all heads at once.
        *args: What the decoder layer gives it.
        **options: The same by name, hidden states [B, S, H] and cos and sin among them.
    """
    if args or any(options.get(name) is not None for name in _WHOLE):
        return forward(*args, **options)
    heads, keys = _heads(module)
    elements = options["hidden_states"][..., 0].numel() * module.head_dim  # of the queries of a head
    if heads * elements <= GROUP:
        return forward(**options)
    step = heads_at_a_time(heads, heads // keys, GROUP // elements)
    right = _same_in_groups(module, forward, options)
    return _grouped(module, step, options) if right else forward(**options)


def _grouped(module: Any, step: int, options: dict[str, Any]) -> tuple[Tensor, None]:
    heads, keys = _heads(module)
    size, readers, output = module.head_dim, heads // keys, torch.empty(0)
    for first, last in pairwise([*range(0, heads, step), heads]):
        part = _of_heads(module, slice(first, last), slice(first // readers, -(-last // readers)))
        attended = type(module).forward(part, **options)[0]  # [B, S, heads of the group x D]
        if first == 0:
            output = attended.new_empty(*attended.shape[:-1], heads * size)
        output[..., first * size : last * size] = attended
        del attended
    return by_tokens(module.o_proj, output), None


def _has_plain_heads(module: nn.Module) -> bool:
    """Whether each head has rows of its own in linear layers that nobody shards, adapts or listens to."""
    names = ("qkv_proj",) if hasattr(module, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
    layers = [getattr(module, name, None) for name in (*names, "o_proj")]
    return "forward" not in vars(module) and hasattr(module, "head_dim") and all(map(_is_plain, layers))


def _is_plain(layer: Any) -> bool:
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    return not any(hasattr(p, "full_tensor") for p in layer.parameters())


def _heads(module: Any) -> tuple[int, int]:
    """Query heads and key heads of an attention layer."""
    if hasattr(module, "qkv_proj"):
        return module.config.num_attention_heads, module.config.num_key_value_heads
    return module.q_proj.out_features // module.head_dim, module.k_proj.out_features // module.head_dim


def _of_heads(module: Any, queries: slice, keys: slice) -> nn.Module:
    """An attention layer of some heads of another, on views of its weights, without an output projection."""
    part = copy.copy(module)
    part._modules = dict(module._modules)
    vars(part).pop("forward", None)
    part.num_key_value_groups = (queries.stop - queries.start) // (keys.stop - keys.start)
    size, (heads, key_heads) = module.head_dim, _heads(module)
    query_rows, key_rows = (slice(s.start * size, s.stop * size) for s in (queries, keys))
    if hasattr(module, "qkv_proj"):
        begins = heads * size, (heads + key_heads) * size
        key_value = [slice(begin + key_rows.start, begin + key_rows.stop) for begin in begins]
        part.qkv_proj = _Rows(module.qkv_proj, query_rows, *key_value)
        part.config = copy.copy(module.config)
        part.config.num_attention_heads = queries.stop - queries.start
        part.num_key_value_heads = part.config.num_key_value_heads = keys.stop - keys.start
    else:
        part.q_proj = _Rows(module.q_proj, query_rows)
        part.k_proj, part.v_proj = (_Rows(layer, key_rows) for layer in (module.k_proj, module.v_proj))
    part.o_proj = nn.Identity()
    return part


class _Rows(nn.Module):
    """Some outputs of a linear layer, without gradients."""

    def __init__(self, linear: nn.Linear, *rows: slice) -> None:
        super().__init__()
        self.weight = _taken(linear.weight, rows)
        self.bias = None if linear.bias is None else _taken(linear.bias, rows)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


def _taken(values: Tensor, rows: tuple[slice, ...]) -> Tensor:
    parts = [values.detach()[one] for one in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _same_in_groups(module: Any, forward: Callable[..., Any], options: dict[str, Any]) -> bool:
    """Whether a layer gives the same for a few tokens whole and one key head at a time."""
    hidden, tables = options["hidden_states"][:, :_FEW], options.get("position_embeddings")
    if not isinstance(tables, tuple) or len(tables) != 2:
        return False
    few = {
        "hidden_states": hidden,
        "position_embeddings": tuple(table[..., :_FEW, :] for table in tables),
        "attention_mask": None,
    }
    heads, keys = _heads(module)
    try:
        whole, ours = forward(**few), _grouped(module, heads // keys, few)[0]
    except (RuntimeError, TypeError, AttributeError):  # weights of another shape for all heads, other arguments
        return False
    if len(whole) != 2 or whole[0].shape != ours.shape:
        return False
    coarse = torch.finfo(ours.dtype).bits < 32 or torch.is_autocast_enabled(ours.device.type)
    return bool((ours - whole[0]).abs().max() < (0.05 if coarse else 1e-3) * whole[0].abs().max())
