"""Kernels of causal attention, and what they are held against.

Shapes: S tokens of a row, H heads, D head size.
"""

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

LAST = 64  # queries whose attention is computed again in float64
RIGHT = {"flash", "cudnn", "varlen", "flash-attn"}
"""Kernels that long rows may have; of the others one is wrong beyond 65,536 tokens."""


def kernels(device: str) -> dict[str, Callable[..., Tensor]]:
    """Kernels by name, each of queries, keys and values [1, H, S, D]."""
    names = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if device == "cuda":
        names = {"flash": names["flash"], "cudnn": SDPBackend.CUDNN_ATTENTION}
        names["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    found: dict[str, Callable[..., Tensor]] = {name: partial(by_sdpa, which) for name, which in names.items()}
    if device == "cuda":
        found["varlen"] = by_varlen
        if find_spec("flash_attn") is not None:
            found["flash-attn"] = by_flash_attn
    return found


def by_sdpa(which: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One backend of torch's SDPA."""
    with sdpa_kernel(which):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def by_varlen(*parts: Tensor) -> Tensor:
    """Torch's variable-length kernel, of one document."""
    length = parts[0].shape[2]
    bounds = torch.tensor([0, length], dtype=torch.int32, device=parts[0].device)
    flat = [part[0].transpose(0, 1) for part in parts]
    output = varlen.varlen_attn(*flat, bounds, bounds, length, length, window_size=(-1, 0))
    return output.transpose(0, 1)[None]


def by_flash_attn(*parts: Tensor) -> Tensor:
    """The flash-attn package."""
    from flash_attn import flash_attn_func

    return flash_attn_func(*(part.transpose(1, 2) for part in parts), causal=True).transpose(1, 2)


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the last queries of the first and last head in float64, [1, 2, LAST, D]."""
    query, key, value = (part[:, (0, -1)].double() for part in (query[:, :, -LAST:], key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    later = torch.ones(LAST, LAST, dtype=torch.bool, device=query.device).triu(1)
    scores[..., -LAST:].masked_fill_(later, -torch.inf)
    return scores.softmax(-1) @ value
