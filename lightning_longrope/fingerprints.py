"""Short names of what scores depend on: a model's weights, a tokenizer, a row of text."""

import hashlib
import json
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_longrope.lora import plain_name
from lightning_longrope.objectives import SearchDocument

_SAMPLES = 64  # values taken of every parameter


def model_digest(model: Any) -> str:
    """Short name of a model's config and weights, from a few values of every parameter.

    Adapters that change nothing yet do not count. The same however the weights are spread over processes (FSDP2, ZeRO
    stage 3), each parameter being gathered for a moment; so every process must call it.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    samples = {name: _sample(parameter) for name, parameter in model.named_parameters()}
    idle = {name.replace(".lora_B.", ".lora_A.") for name in samples if ".lora_B." in name and not samples[name].any()}
    for name, sample in samples.items():
        if name.replace(".lora_B.", ".lora_A.") not in idle:
            digest.update(plain_name(name).encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(parameter: Tensor) -> Tensor:
    """Values at even distances over the whole parameter, at most 64, float32 on the CPU."""
    partitioned = hasattr(parameter, "ds_id") and parameter.numel() == 0
    with _gathered(parameter) if partitioned else nullcontext():
        whole = parameter.detach()
        whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        flat = whole.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float().cpu()
        return sample.clone()  # numpy() fixes the size of a storage, and FSDP2 resizes those of parameters


def _gathered(parameter: Tensor) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Short name of a tokenizer's vocabulary and special tokens; None without one."""
    if tokenizer is None:
        return None
    special = sorted((str(key), str(value)) for key, value in tokenizer.special_tokens_map.items())
    return _digest([sorted(tokenizer.get_vocab().items()), special])


def document_digests(documents: Iterable[SearchDocument]) -> list[str]:
    """Short name of every row: its tokens, its answer and which tokens count as text."""
    return [_document_digest(document) for document in documents]


def _document_digest(document: SearchDocument) -> str:
    digest = hashlib.sha256(f"{len(document.tokens)} {document.answer} ".encode())
    for part in (document.tokens.to(torch.int64), document.counted.double()):
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def joint_digest(digests: list[str]) -> str:
    """Short name of several rows in their order."""
    return _digest(digests)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
