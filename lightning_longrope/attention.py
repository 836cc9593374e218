"""Which attention kernel a model gets, and why: said once, so that nobody trains on a slow one without knowing."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

log = logging.getLogger(__name__)


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
    kernel, modes = config._attn_implementation, [(module, module.training) for module in model.modules()]
    types = {p.dtype for p in model.parameters()}
    flash = kernel is not None and ("flash" in kernel or kernel.startswith("fa"))
    autocast = len(types) > 1 or (flash and device != "cpu" and torch.float32 in types)
    half = torch.autocast(device, torch.bfloat16) if autocast else nullcontext()
    model.eval()
    if flash and device == "cpu":
        config._attn_implementation_internal = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"
    try:
        with torch.no_grad(), half:
            yield autocast or types != {torch.float32}
    finally:
        if flash and device == "cpu":
            config._attn_implementation_internal = kernel
        for module, training in modes:
            module.training = training


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
