"""Attention in which the documents of a row do not see each other, without a mask over the whole row.

Hugging Face isolates documents by a dense [S, S] mask (17 GB at 128k tokens) built from positions that begin again, and
not at all if a cache or a mask is given. Here the bounds of the documents reach the attention itself:

- FlashAttention of Hugging Face takes them as they are (``cu_seq_lens``).
- In place of sdpa and eager attention stands a function that attends within one document at a time, on CUDA in a half
  type by one call of torch's own variable-length FlashAttention. Plain batches go through it untouched.
- FlexAttention builds its sparse mask from the positions.

Plain rows of models with sliding windows go the same way, as one document each: of a window Hugging Face makes a dense
mask too. The work and memory are those of the documents alone. That a model took the bounds is proved before they are
relied on.

Shapes: B rows, S tokens of a row, H query heads, D head size, K documents of a batch.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_longrope.attention import Attention, any_length, in_head_groups, is_long, probing, readers_of_a_key
from lightning_longrope.sliding import sliding_window

log = logging.getLogger(__name__)

SUFFIX = "_by_document"
"""What the name of an attention implementation gains when ours takes its place."""

OVER_RANKS = "_over_ranks"
"""What it gains when ranks share the rows, in ``sequence_parallel``, whose attention isolates documents too."""

_isolating: ContextVar[bool] = ContextVar("isolating", default=False)


class Stretches:
    """Where the documents of a batch lie, its rows laid end to end; opaque to ``torch.compile``.

    Args:
        cu_seq_lens: Bounds of the documents, the end of the last row included, [K + 1] int32. No document goes on in
            another row, so multiples of S are among them.
        max_length: Tokens of the longest document, or more.
    """

    def __init__(self, cu_seq_lens: Tensor, max_length: int) -> None:
        self.cu_seq_lens = cu_seq_lens
        self.max_length = max_length

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """First token of each document and the one after its last; waits for the device once."""
        values = self.cu_seq_lens.tolist()
        return list(zip(values, values[1:], strict=False))


def plain_rows(model: PreTrainedModel, input_ids: Tensor) -> Stretches | None:
    """Rows of one document each, where that spares the dense mask that Hugging Face makes of a sliding window.

    Args:
        model: A Hugging Face causal language model.
        input_ids: Tokens, [B, S] int64.

    Returns:
        None where the attention makes no mask: without windows shorter than the rows, or with kernels that have them.
    """
    rows, length = input_ids.shape
    found = sliding_window(model.config)
    if "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        _warn_of_mask(type(model).__name__)  # of Llama 4, whose chunks we do not know
    if found is None or length <= found.length or not model.config._attn_implementation.startswith(("sdpa", "eager")):
        return None
    try:
        _prepare(model)
    except RuntimeError:
        _warn_of_mask(type(model).__name__)
        return None
    return Stretches(torch.arange(rows + 1, device=input_ids.device, dtype=torch.int32) * length, length)


def fit_for_long_rows(model: PreTrainedModel, length: int) -> None:
    """Gives a model our attention in place of sdpa before a forward of long rows, for good.

    Its kernels are right for them (see ``attention``), with and without documents. Other implementations stay.

    Args:
        model: A Hugging Face causal language model.
        length: S, tokens of the rows.
    """
    if is_long(length, length) and model.config._attn_implementation == "sdpa":
        _register("sdpa")
        model.set_attn_implementation("sdpa" + SUFFIX)


@cache
def _warn_of_mask(model: str) -> None:
    log.warning(
        "%s takes no bounds of rows, so under sdpa and eager attention transformers builds a dense mask for its"
        " windows, S x S for rows of S tokens: for long rows choose flash_attention_2 or flex_attention as the"
        " `attn_implementation`.",
        model,
    )


@contextmanager
def isolated_documents(model: PreTrainedModel, stretches: Stretches) -> Iterator[dict[str, Any]]:
    """Keywords for a forward of the decoder, inside the context, that keep the documents apart.

    The positions given to the same forward must begin again with every document. The first use gives the model our
    attention for good and proves that it isolates.

    Args:
        model: A Hugging Face causal language model.
        stretches: Where the documents lie.

    Raises:
        ValueError: If the attention implementation of the model cannot isolate documents.
        RuntimeError: If a document still sees another one.
    """
    _prepare(model)
    token = _isolating.set(True)
    try:
        yield _keywords(model, stretches)
    finally:
        _isolating.reset(token)


def _keywords(model: PreTrainedModel, stretches: Stretches) -> dict[str, Any]:
    implementation = model.config._attn_implementation
    if implementation == "flex_attention":
        return {}
    return flash_keywords(stretches) if implementation.startswith("flash_attention") else {"stretches": stretches}


def flash_keywords(stretches: Stretches) -> dict[str, Any]:
    """The bounds of documents as FlashAttention of transformers takes them."""
    bounds, longest = stretches.cu_seq_lens, stretches.max_length
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _prepare(model: PreTrainedModel) -> None:
    """Gives a model attention that can isolate, once."""
    implementation = model.config._attn_implementation
    if getattr(model, "_isolates", None) == implementation:
        return
    if implementation in ("sdpa", "eager"):
        _register(implementation)
        model.set_attn_implementation(implementation + SUFFIX)
    elif not implementation.startswith(("flash_attention", "flex_attention")) and not implementation.endswith(
        (SUFFIX, OVER_RANKS)
    ):
        raise ValueError(
            f"Isolated documents need `attn_implementation` sdpa, eager, flash_attention_2 or flex_attention, got"
            f" {implementation!r}: choose one of these, or `packing: concat` without `isolate_documents`."
        )
    model._isolates = model.config._attn_implementation
    try:
        _prove(model)
    except BaseException:
        del model._isolates
        raise


def _register(implementation: str) -> None:
    """Makes our attention known under the name of the one it falls back on."""
    AttentionInterface.register(implementation + SUFFIX, attention_by_document(implementation))
    AttentionMaskInterface.register(implementation + SUFFIX, mask_by_document(implementation))


def attention_by_document(implementation: str) -> Attention:
    """Attention that takes ``stretches``; without them it is that of the name, sdpa or eager."""
    if implementation == "eager":
        return _eager_by_document
    known = any_length(ALL_ATTENTION_FUNCTIONS[implementation])

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        stretches = options.pop("stretches", None)

        def of_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with readers_of_a_key(module, query.shape[1] // key.shape[1]):
                if stretches is None:
                    return known(module, query, key, value, mask, **options)[0]
                return _by_document(known, implementation, module, query, key, value, stretches, options)[0]

        if stretches is not None:
            query, key, value = in_computing_type(query, key, value)
        return in_head_groups(of_heads, query, key, value), None

    return attention


def _eager_by_document(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    stretches, eager = options.pop("stretches", None), _eager_of(module)
    if stretches is None:
        return eager(module, query, key, value, mask, **options)
    return _by_document(eager, "eager", module, query, key, value, stretches, options)


def in_computing_type(*parts: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values in the type that autocast would compute attention in.

    Rotary embeddings leave queries and keys in float32 beside half-precision values.
    """
    device = parts[0].device.type
    known = device != "meta"  # tensors without data, after memory did not suffice
    kind = torch.get_autocast_dtype(device) if known and torch.is_autocast_enabled(device) else None
    return parts if kind is None else tuple(part.to(kind) for part in parts)


def mask_by_document(implementation: str) -> Callable[..., Any]:
    """What makes the masks of an attention, sdpa or eager: none where documents are isolated."""
    mask_of = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

    def mask(*arguments: Any, **options: Any) -> Any:
        return None if _isolating.get() else mask_of(*arguments, **options)

    return mask


def _eager_of(module: Any) -> Any:
    """The eager attention function of the model an attention layer is from."""
    return sys.modules[type(module).__module__].eager_attention_forward


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_document(
    fallback: Callable[..., tuple[Tensor, Any]],
    implementation: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stretches: Stretches,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention within each document, [B, S, H, D], from queries [B, H, S, D] and keys and values of as many heads."""
    if implementation == "sdpa" and _varlen_runs(query, value, options):
        return _varlen(query, key, value, stretches, options), None
    length, window, output = query.shape[2], options.get("sliding_window"), []
    options = {name: value for name, value in options.items() if name != "is_causal"}
    for first, last in stretches.bounds:
        row, begin = divmod(first, length)
        for low, high, seen in _blocks(last - first, window):
            queries = query[row : row + 1, :, begin + low : begin + high]
            keys, values = (part[row : row + 1, :, begin + seen : begin + high] for part in (key, value))
            mask = None
            if implementation == "eager" or seen or low:
                mask = _band(low, high, seen, window, query, additive=implementation == "eager")
            output.append(fallback(module, queries, keys, values, mask, **options)[0])
    return torch.cat(output, dim=1).view(query.shape[0], length, *output[0].shape[2:]), None


def _blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """Queries of a document as ranges, and the first key each sees: one block, or many under a sliding window."""
    if window is None or length <= window:
        yield 0, length, 0
        return
    for low in range(0, length, window):
        yield low, min(low + window, length), max(0, low - window + 1)


def _band(low: int, high: int, seen: int, window: int | None, like: Tensor, additive: bool) -> Tensor:
    """Which of the keys from ``seen`` on the queries from ``low`` to ``high`` see, [1, 1, queries, keys]."""
    distance = torch.arange(low, high, device=like.device)[:, None] - torch.arange(seen, high, device=like.device)
    kept = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    if not additive:
        return kept[None, None]
    return torch.zeros_like(kept, dtype=like.dtype).masked_fill(~kept, torch.finfo(like.dtype).min)[None, None]


def _varlen_runs(query: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether torch's variable-length FlashAttention does what is asked for."""
    known = {"window_size", "enable_gqa"} <= set(inspect.signature(varlen.varlen_attn).parameters)
    fits = query.shape[-1] == value.shape[-1] <= 256 and query.dtype in (torch.float16, torch.bfloat16)
    plain = not options.get("dropout") and options.get("softcap") is None and options.get("position_bias") is None
    return known and fits and plain and query.is_cuda


def _varlen(query: Tensor, key: Tensor, value: Tensor, stretches: Stretches, options: dict[str, Any]) -> Tensor:
    rows, heads, length, size = query.shape
    window = options.get("sliding_window")
    flat = [part.transpose(1, 2).reshape(rows * length, -1, size) for part in (query, key, value)]
    before = -1 if window is None else window - 1  # keys that a query sees, but for its own
    output = varlen.varlen_attn(
        flat[0],
        flat[1],
        flat[2],
        stretches.cu_seq_lens,
        stretches.cu_seq_lens,
        stretches.max_length,
        stretches.max_length,
        scale=options.get("scaling"),
        window_size=(before, 0),
        enable_gqa=key.shape[1] != heads,
    )
    assert isinstance(output, Tensor)
    return output.view(rows, length, heads, size)


@torch.no_grad()
def _prove(model: PreTrainedModel) -> None:
    """Checks that the second of two documents does not notice a change of the first.

    Raises:
        RuntimeError: If it does.
    """
    embedding = model.get_input_embeddings().weight
    device = embedding.device
    rows = getattr(getattr(model.get_decoder(), "rotary_emb", None), "rows", None) or 1  # it may have a table for each
    bounds = [12 * row + start for row in range(rows) for start in (0, 5)]
    stretches = Stretches(torch.tensor([*bounds, 12 * rows], dtype=torch.int32, device=device), 7)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(rows, -1).to(device)
    found = []
    with probing(model), torch.compiler.set_stance("force_eager"):
        for first in (1, 2):
            tokens = torch.full((rows, 12), first, device=device)
            tokens[:, 5:] = 3
            with isolated_documents(model, stretches) as keywords:
                output = model.get_decoder()(input_ids=tokens, position_ids=positions, use_cache=False, **keywords)
            found.append(output.last_hidden_state.float())
    apart = (found[0] - found[1]).abs()[0].amax(-1)
    if not apart[:5].any() or apart[5:].max() > 1e-3 * apart[:5].max():
        raise RuntimeError(
            f"The documents of a row see each other in {type(model).__name__} with the attention"
            f" {model.config._attn_implementation!r}, so it cannot be trained on isolated documents: choose"
            " `packing: concat` without `isolate_documents`."
        )
