"""The output head of a causal language model, as the losses use it.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

LOGITS_AT_A_TIME = 1 << 25
"""Most logits of a training step that exist at a time: 128 MiB in float32, about what Liger takes of a 7B."""

Head = Callable[[Tensor], Tensor]
"""Maps hidden states [n, H] to logits [n, V]."""


class OutputHead:
    """Turns final hidden states [..., H] into the logits [..., V] of a model's own forward.

    Covers the soft cap of Gemma 2 and the logit scales of Cohere, Granite and Falcon-H1.

    Args:
        model: A Hugging Face causal language model.

    Attributes:
        module: Its output layer; of tied embeddings its weight is theirs, and with adapters it is the wrapped layer.
        vocabulary: V.
        plain: Whether logits are what the output layer gives, neither scaled nor capped.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.module: nn.Module = model.get_output_embeddings()
        self.vocabulary = int(getattr(config, "vocab_size", 1))
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        scale = float(getattr(config, "logit_scale", None) or 1.0) * float(getattr(config, "lm_head_multiplier", 1.0))
        divisor = float(getattr(config, "logits_scaling", 1.0))
        if config.model_type == "hyperclovax":  # whose scaling of the same name multiplies
            scale, divisor = scale * divisor, 1.0
        self._scale, self._divisor = scale, divisor
        self.plain = self._cap is None and scale == divisor == 1

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, [..., H] to [..., V]."""
        return self.finished(self.module(hidden))

    def finished(self, values: Tensor) -> Tensor:
        """Logits of what the output layer gives: scaled and capped, or the same tensor."""
        if self._scale != 1 or self._divisor != 1:
            values = values * self._scale / self._divisor
        return values if self._cap is None else torch.tanh(values / self._cap) * self._cap

    def within(self, work: Callable[["HeadLogits", Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Work that needs the weights of the output layer, done inside one call of it.

        Strategies that partition weights gather them before a module's forward and count on the gradients of that
        call, so a loss that reads the weights or makes their gradients itself must run there.

        Args:
            work: Given the logits as they come without any hooks of the output layer, and ``hidden``.
            hidden: What the output layer is called with, [N, H].

        Returns:
            What ``work`` returns.
        """
        module = self.module
        patched, own = "forward" in vars(module), module.forward
        module.forward = lambda states: work(HeadLogits(self, own), states)
        try:
            return module(hidden)
        finally:
            if patched:
                module.forward = own
            else:
                del module.forward

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters of the output layer that need gradients."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @property
    def partitioned(self) -> bool:
        """Whether a strategy keeps parts of the output layer's weights on other ranks."""
        return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in self.module.parameters())

    @property
    def partitioned_inside(self) -> bool:
        """Whether ZeRO stage 3 gathers weights for layers inside the output layer, when these are called."""
        return any(hasattr(p, "ds_id") for child in self.module.children() for p in child.parameters())

    @property
    def tokens_at_a_time(self) -> int:
        """Tokens of a training step whose logits should exist at a time."""
        return max(1, LOGITS_AT_A_TIME // self.vocabulary)


class HeadLogits:
    """The logits of an output head inside a call of its layer.

    Args:
        head: The output head.
        forward: What its layer does when it is called.

    Attributes:
        linear: The layer, if its own forward is the product with its weight and nothing else.
    """

    def __init__(self, head: OutputHead, forward: Head) -> None:
        self.head = head
        self.finished = head.finished
        self._forward = forward
        product = getattr(forward, "__func__", None) is nn.Linear.forward
        self.linear = cast("nn.Linear", head.module) if product else None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, [n, H] to [n, V]."""
        return self.finished(self._forward(hidden))
