"""A forward pass that does not fit: recognised, and ended without leaving other processes waiting."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map_only
from typing_extensions import override


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on an accelerator or in the CPU's allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    marks = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in marks)


def free_memory() -> None:
    """Gives back what a failed forward pass has left behind. Call it outside of the ``except``, which holds frames."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gathers_weights(model: nn.Module) -> bool:
    """Whether a forward pass gathers weights from other processes (FSDP2, ZeRO stage 3)."""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


class GoOnWithShapes(TorchFunctionMode):
    """Ends a forward pass that ran out of memory on tensors without data.

    A process that leaves a pass early would leave the others waiting for its part in the next gathering of weights. So
    the operation that did not fit gives a tensor on the meta device, and so does all that is computed from it, to the
    end; the hooks that gather weights run as ever. What comes out is worth nothing where ``failed``.

    Does not help where a gathering itself does not fit, nor with a model whose next step depends on values.
    """

    failed = False

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.failed and tree_any(_is_meta, (args, kwargs)):
            return _on_meta(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        free_memory()
        self.failed = True
        return _on_meta(func, args, kwargs)


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _on_meta(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    if func in (Tensor.cpu, Tensor.cuda):
        return args[0]
    if func is Tensor.to:
        args = tuple("meta" if isinstance(arg, torch.device | str) else arg for arg in args)
    return func(*args, **{name: "meta" if name == "device" else value for name, value in kwargs.items()})
