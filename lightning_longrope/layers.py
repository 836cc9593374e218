"""The decoder layers of a Hugging Face model: found, compiled, initialised, sharded."""

import logging
import math
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

log = logging.getLogger(__name__)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of decoder layers of a Hugging Face model.

    Raises:
        ValueError: If the base model has no list of layers.
    """
    lists: Iterator[nn.ModuleList] = (m for m in model.base_model.children() if isinstance(m, nn.ModuleList))
    layers = next(lists, None)
    if layers is None:
        raise ValueError(f"{type(model).__name__} keeps no list of decoder layers where Hugging Face models do.")
    return layers


def has_compiler() -> bool:
    """Whether there is a C++ compiler for ``compile_decoder_layers``."""
    return any(map(shutil.which, ("g++", "clang++", "cl")))


def compile_decoder_layers(model: Any) -> None:
    """Compiles each layer in place; says so and leaves the model as it is where there is no C++ compiler.

    Layers and not the whole model: a compiled model builds dense attention masks.
    """
    if not has_compiler():
        log.info("No C++ compiler (g++, clang++) found: training goes on without torch.compile.")
        return
    for layer in decoder_layers(model):
        layer.compile(dynamic=False)


@torch.no_grad()
def scale_initial_weights(model: Any) -> None:
    """Initial weights for training from scratch: matrices at 1/sqrt(fan in), residual outputs smaller with depth.

    The two outputs a layer adds to the residual stream are divided by sqrt(2 x layers), so that the stream keeps
    its size. Embeddings and norms stay as Hugging Face makes them.
    """
    layers = decoder_layers(model)
    residual = {"o_proj", "down_proj", "dense", "dense_4h_to_h"}
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear):
            std = 1 / math.sqrt(module.in_features)
            if name.rsplit(".", 1)[-1] in residual:
                std /= math.sqrt(2 * len(layers))
            nn.init.normal_(module.weight, std=std)


def shard_weights(model: Any, mesh: DeviceMesh, **options: Any) -> None:
    """Shards a causal language model in place: each decoder layer, the output head and what is left, one after another.

    The decoder is the root: this package calls it and the head, never the whole model, when rows are long.

    Args:
        model: A Hugging Face causal language model.
        mesh: The ranks to shard over, one dimension.
        **options: Those of ``torch.distributed.fsdp.fully_shard``.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, **options)
    tied = head.weight is embedding.weight
    fully_shard([embedding, head] if tied else head, mesh=mesh, reshard_after_forward=False, **options)
    fully_shard(decoder, mesh=mesh, **options)
