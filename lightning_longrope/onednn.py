"""Float32 linear layers on a CPU by oneDNN, which takes AVX-512 wherever the processor has it.

Torch leaves float32 products to MKL, which takes AVX2 on processors that are not Intel's: there oneDNN is twice as
fast. Half types go to oneDNN anyway. For inference only: the operator has no backward pass.

Shapes: N rows, I inputs, O outputs.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override


def fast_linear(device: torch.device) -> AbstractContextManager[Any]:
    """Lets linear layers in float32 on a CPU go through oneDNN inside the context, where gradients are off.

    Does nothing on other devices, under autocast, and where torch lacks the operator or the processor AVX-512.
    Results differ from those outside by rounding.

    Args:
        device: Where the layers are.
    """
    plain = device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return _LinearByOneDNN() if plain and _works() else nullcontext()


class _LinearByOneDNN(TorchFunctionMode):
    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and _suits(*args):
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _suits(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether both are plain float32 tensors in memory that nothing would cast first."""
    plain = all(type(part) in (Tensor, torch.nn.Parameter) and part.is_cpu for part in (states, weight))
    return (
        plain
        and states.dtype == weight.dtype == torch.float32
        and weight.is_contiguous()
        and weight.numel() > 0 < states.numel()
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    )


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``states @ weight.T + bias``, [..., O], of [..., I], [O, I] and [O]."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return found


@cache
def _works() -> bool:
    """Whether torch has the operator, which is none of its public ones, and it does what is expected of it."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    # small integers, whose products are exact in any order
    parts = ((24, (2, 3, 4)), (20, (5, 4)), (5, (5,)))
    states, weight, bias = (torch.arange(n, dtype=torch.float32, device="cpu").view(shape) for n, shape in parts)
    try:
        with torch.no_grad():
            return torch.equal(_linear(states, weight, bias), F.linear(states, weight, bias))
    except (AttributeError, RuntimeError):
        return False
