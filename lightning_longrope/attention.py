"""Which attention kernel a model gets, and why: said once, so that nobody trains on a slow one without knowing.

Long rows get only kernels of torch's ``scaled_dot_product_attention`` that are right for them. The memory-efficient one
computes offsets in 32 bits and gives wrong numbers without a word from the pair of tokens on that needs the 33rd (torch
2.9 to 2.14, pytorch issues 162588 and 187227); the math one holds the scores of all pairs. Flash has 64-bit offsets,
and of cuDNN's torch itself knows the versions that are right, so its order of the two stays. No call gets tensors of
2^31 elements: then heads go in groups, keys and values with the queries that read them.

Shapes: B rows, S tokens of a row, H query heads, K key heads, D head size.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available

log = logging.getLogger(__name__)

Attention = Callable[..., tuple[Tensor, Tensor | None]]
"""Attention as transformers calls it: the module, queries, keys, values, a mask and options."""

PAIRS = 2**32
"""Pairs of a query and a key beyond which not every kernel is right: rows of more than 65,536 tokens."""

ELEMENTS = 2**31
"""Elements of a tensor that offsets of 32 bits do not reach."""


def choose_attention(requested: str, dtype: torch.dtype, cuda: bool | None = None) -> tuple[str | None, str]:
    """The kernel that a request stands for, and the reason.

    Args:
        requested: A name of transformers, which is taken as it is, or ``auto``.
        dtype: Type of the weights.
        cuda: Whether the model is for a CUDA device; by default where there is one.

    Returns:
        The name; None leaves the choice to transformers, which takes sdpa where the model can.
    """
    if requested != "auto":
        return requested, "as configured"
    if not (torch.cuda.is_available() if cuda is None else cuda):
        return None, "FlashAttention needs CUDA"
    if not is_flash_attn_2_available():
        return None, "flash-attn is not installed: pip install flash-attn --no-build-isolation"
    if dtype not in (torch.float16, torch.bfloat16):
        return None, f"FlashAttention needs weights in a half type (`dtype: bfloat16`), these are {_name(dtype)}"
    return "flash_attention_2", f"flash-attn is installed and weights are {_name(dtype)}"


@contextmanager
def probing(model: Any) -> Iterator[bool]:
    """Lets a few tokens go through a model in whatever state it is, and leaves no trace on it.

    Eval mode, no gradients; autocast where parts of the model differ in type or its kernel knows half types only; and
    another kernel where its own cannot run, as FlashAttention on a CPU before the model goes to its device.

    Args:
        model: A Hugging Face causal language model.

    Yields:
        Whether the result has the precision of a half type.
    """
    device, config = model.get_input_embeddings().weight.device.type, model.config
    kernel = config._attn_implementation
    types = {p.dtype for p in model.parameters()}
    flash = kernel is not None and ("flash" in kernel or kernel.startswith("fa"))
    autocast = len(types) > 1 or (flash and device != "cpu" and torch.float32 in types)
    half = torch.autocast(device, torch.bfloat16) if autocast else nullcontext()
    if flash and device == "cpu":
        config._attn_implementation_internal = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"
    try:
        with evaluating(model), torch.no_grad(), half:
            yield autocast or types != {torch.float32}
    finally:
        if flash and device == "cpu":
            config._attn_implementation_internal = kernel


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; the mode of every part as it was afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def is_long(queries: int, keys: int) -> bool:
    """Whether so many queries and keys are beyond some of torch's kernels."""
    return queries * keys > PAIRS


def any_length(attention: Attention) -> Attention:
    """Makes an attention that calls torch's SDPA fit for long rows; short ones go through it untouched.

    Args:
        attention: Takes queries [B, H, S, D] and keys and values [B, K, S, D], and gives [B, S, H, D].

    Raises:
        ValueError: When called, if no kernel that is right for long rows can run.
    """

    def fit(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not is_long(query.shape[2], key.shape[2]) or query.device.type not in ("cpu", "cuda"):
            return attention(module, query, key, value, mask, **options)
        return _with_right_kernels(attention, module, query, key, value, mask, options)

    return fit


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _with_right_kernels(
    attention: Attention,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    cuda = torch.backends.cuda
    switches = {SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled, SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled}
    try:
        with sdpa_kernel([kernel for kernel, is_on in switches.items() if is_on()]):
            return attention(module, query, key, value, mask, **options)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("No available kernel", "No viable backend")):
            raise
        raise ValueError(
            f"No attention kernel of torch that is right for rows of {query.shape[2]:,} tokens takes"
            f" {_name(query.dtype)} with heads of {query.shape[-1]}{' and a dense mask' if mask is not None else ''}."
            " Flash and cuDNN take half types (`trainer.precision: bf16-mixed`) with heads of up to 256 and no mask; or"
            " choose `attn_implementation: flash_attention_2`."
        ) from error


def heads_at_a_time(heads: int, readers: int, most: int) -> int:
    """Query heads of a group: with all that read the same keys, or an equal share of these; one at least.

    Args:
        heads: Query heads in all.
        readers: How many of them read a key head.
        most: How many are wanted at most.
    """
    if most >= heads:
        return heads
    return most // readers * readers or max(n for n in range(1, max(1, most) + 1) if readers % n == 0)


def in_head_groups(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Attention of all heads, a group at a time where a call would get tensors of 2^31 elements.

    Args:
        attention: Of queries [B, H, S, D], keys and values [B, K, S, D] of a group; gives [B, S, H, D].
        query: Queries, [B, H, S, D].
        key: Keys, [B, K, S, D]; each is read by H / K query heads.
        value: Values, [B, K, S, D'].

    Returns:
        [B, S, H, D'].
    """
    largest = max(part[:, :1].numel() for part in (query, key, value))  # of one head
    at_a_time = max(1, (ELEMENTS - 1) // max(1, largest))
    heads, readers = query.shape[1], query.shape[1] // key.shape[1]
    if heads <= at_a_time:
        return attention(query, key, value)
    step = heads_at_a_time(heads, readers, at_a_time)
    output = []
    for first in range(0, heads, step):
        queries = slice(first, min(first + step, heads))
        keys = slice(first // readers, -(-queries.stop // readers))
        # contiguous: a view of all heads keeps strides that reach beyond
        parts = (part.contiguous() for part in (query[:, queries], key[:, keys], value[:, keys]))
        output.append(attention(*parts))
    return torch.cat(output, dim=2)


@contextmanager
def readers_of_a_key(module: Any, readers: int) -> Iterator[None]:
    """Lets an attention layer believe that so many query heads read each key head, as when it is given some of them."""
    configured = getattr(module, "num_key_value_groups", None)
    if configured is not None:
        module.num_key_value_groups = readers
    try:
        yield
    finally:
        if configured is not None:
            module.num_key_value_groups = configured


def say_attention(model: Any, reason: str) -> None:
    """Logs the kernel of a loaded model, once for each kernel and reason, on the first process only."""
    if all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")):
        _say(model.config._attn_implementation, reason, type(model).__name__)


@cache
def _say(kernel: str, reason: str, model: str) -> None:
    log.info("Attention: %s (%s).", kernel, reason)
    if kernel == "eager" and reason != "as configured":
        log.warning(
            "%s has no sdpa attention, and eager attention holds scores of all pairs of tokens: for long rows choose"
            " `attn_implementation: flash_attention_2` or flex_attention.",
            model,
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
