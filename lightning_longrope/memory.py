"""What a training step keeps, and where, in exchange for time. The gradients are those of a plain step.

    gradient checkpointing   of each layer only its input; the rest is computed again in the backward pass
    offload_activations      these inputs on the CPU
    mlp_tile                 norms and MLPs on some tokens at a time, computed again in the backward pass

``estimate`` says what each of them is worth. Shapes: B rows, S tokens, H hidden size, L layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Memory:
    """Further savings of memory in training.

    Attributes:
        offload_activations: Keep the inputs of checkpointed layers on the CPU, L x H x 2 bytes a token in a half type.
            They are copied to and fro through pinned memory, which takes little time beside long rows. Needs
            ``gradient_checkpointing``, and layers that are not compiled.
        mlp_tile: Tokens that go through an MLP or a norm at a time, 8192 for instance; all if None. In bfloat16 this
            halves what a checkpointed layer needs at once.

    Raises:
        ValueError: If ``mlp_tile`` is not positive.
    """

    offload_activations: bool = False
    mlp_tile: int | None = None

    def __post_init__(self) -> None:
        if self.mlp_tile is not None and self.mlp_tile < 1:
            raise ValueError(f"`memory.mlp_tile` must be at least 1 token, or null for no tiles, got {self.mlp_tile}.")


def check_memory(memory: Memory, gradient_checkpointing: bool, compile_layers: bool = False) -> None:
    """Refuses what has no effect.

    Raises:
        ValueError: If there are no checkpointed layers whose inputs could go to the CPU, or they could not be compiled.
    """
    if memory.offload_activations and not gradient_checkpointing:
        raise ValueError(
            "`memory.offload_activations` moves the inputs of checkpointed layers, and there are none:"
            " set `gradient_checkpointing: true` too."
        )
    if memory.offload_activations and compile_layers:
        raise ValueError(
            "`compile_layers` has no effect with `memory.offload_activations`, which torch.compile does not take:"
            " set one of them to false."
        )


def save_memory(model: Any, layers: nn.ModuleList, gradient_checkpointing: bool, memory: Memory) -> None:
    """Makes the training steps of a Hugging Face model keep less, in place.

    Args:
        model: The model, before a strategy wraps it.
        layers: Its decoder layers.
        gradient_checkpointing: Keep only the inputs of layers.
        memory: Further savings.

    Raises:
        ValueError: If the model's layers have no MLP that works on each token alone.
    """
    check_memory(memory, gradient_checkpointing)
    if gradient_checkpointing:
        older = getattr(model, "gradient_checkpointing_enable", None)  # before transformers 5.23
        enable: Any = getattr(model, "activation_checkpointing_enable", older)
        enable({"use_reentrant": False})
    if memory.offload_activations:
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = offloaded_checkpoint
    if memory.mlp_tile is not None:
        for module in _of_single_tokens(model, layers):
            module.forward = partial(_tiled_forward, module.forward, tile=memory.mlp_tile)


def offloaded_checkpoint(function: Any, *args: Any) -> Any:
    """``torch.utils.checkpoint`` whose inputs wait on the CPU, in pinned memory where there is CUDA."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *args, use_reentrant=False)


def mlp_of(layer: Any) -> nn.Module | None:
    """The MLP of a decoder layer, if it has one."""
    return next((getattr(layer, name) for name in ("mlp", "feed_forward") if hasattr(layer, name)), None)


def norms_of(parent: nn.Module) -> list[nn.Module]:
    """The norms that a decoder or one of its layers applies to hidden states."""
    return [child for child in parent.children() if "norm" in type(child).__name__.lower()]


def _of_single_tokens(model: Any, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """The norms and MLPs."""
    for layer in layers:
        if (mlp := mlp_of(layer)) is None:
            raise ValueError(
                f"`memory.mlp_tile`: {type(layer).__name__} has no `mlp`, so it cannot be tiled. Leave it out."
            )
        yield mlp
    for parent in (model.base_model, *layers):
        yield from norms_of(parent)


def _tiled_forward(forward: Any, hidden: Tensor, *, tile: int) -> Tensor:
    """What a module makes of every token, [B, S, H], its rows laid end to end and cut into tiles."""
    if hidden.shape[:-1].numel() <= tile:
        return forward(hidden)
    tokens = hidden.reshape(1, -1, hidden.shape[-1])
    outputs = [checkpoint(forward, part, use_reentrant=False) for part in tokens.split(tile, dim=1)]
    if not all(isinstance(output, Tensor) for output in outputs):
        raise ValueError("`memory.mlp_tile` needs an MLP that gives hidden states alone. Leave it out for this model.")
    return torch.cat(outputs, dim=1).view(hidden.shape)
