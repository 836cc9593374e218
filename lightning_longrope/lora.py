"""Low-rank adapters (arXiv:2106.09685) for training long windows on few cards, by peft.

The defaults are LongLoRA's (arXiv:2309.12307): adapters on the attention projections, with norms and embeddings trained
too, without which adapters of any rank fall behind full fine-tuning at long windows. Its sparse attention is not here.

The model stays the Hugging Face model it was, its adapted layers wrapped in place. A checkpoint holds all weights;
``load_model`` and ``export_model`` add the adapters to the weights they adapt, so that nobody else meets them.

Shapes: O and I output and input size of an adapted layer, R rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

_ADAPTER = "default"  # peft's name for the only adapter


@dataclass(frozen=True)
class LoRA:
    """Which low-rank adapters a model gets, and what is trained beside them.

    Attributes:
        rank: Columns of every adapter.
        alpha: An adapter counts ``alpha / rank`` times.
        dropout: Share of an adapter's input that is dropped in training.
        targets: Last names of the linear layers to adapt, such as ``q_proj``; all linear layers of the attention if
            None.
        train_norms: Train the normalisation layers.
        train_embeddings: Train the input embeddings; an output head tied to them is trained with them.

    Raises:
        ValueError: If a number is out of its range, or there are no targets.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    train_norms: bool = True
    train_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "`lora` needs a rank of at least 1, a positive alpha and a dropout of at least 0 and below 1,"
                f" got rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}."
            )
        if self.targets is not None and not self.targets:
            raise ValueError("`lora.targets` is empty: name layers such as q_proj, or leave it out.")
        if self.targets is not None:  # files give lists, which have no hash
            object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def scale(self) -> float:
        """What the product of an adapter's matrices is multiplied by."""
        return self.alpha / self.rank

    def same_model(self, other: "LoRA | None") -> bool:
        """Whether two settings train the same parameters of the same model; dropout may differ."""
        return other is not None and replace(other, dropout=self.dropout) == self


def add_adapters(model: PreTrainedModel, lora: LoRA) -> None:
    """Gives a model adapters in place and freezes all that is not trained; its logits stay what they are.

    What is trained is float32 whatever the type of the frozen weights, so that small steps are not rounded away; a
    trainer with ``bf16-true`` makes it bf16 again.

    Args:
        model: A Hugging Face causal language model; keeps the settings as ``model.lora``.
        lora: The adapters.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If there is no such layer, it is not linear, or its weight belongs to another layer too.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError('`lora` needs peft: pip install "lightning-longrope[lora]".') from error
    names = _targets(model, lora)
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
    inject_adapter_in_model(settings, model, _ADAPTER)
    for name in names:
        _set_partitioned(model.get_submodule(name))
    for parameter in _trained_whole(model, lora):
        parameter.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()
    model.lora = lora


def _targets(model: PreTrainedModel, lora: LoRA) -> list[str]:
    """Full names of the layers to adapt."""
    modules, tied = dict(model.named_modules()), id(model.get_input_embeddings().weight)
    if lora.targets is None:
        names = [name for name, module in modules.items() if isinstance(module, nn.Linear) and _in_attention(name)]
    else:
        names = [name for name in modules if name.rsplit(".", 1)[-1] in lora.targets]
    missing = sorted(set(lora.targets or ()) - {name.rsplit(".", 1)[-1] for name in names})
    if missing or not names:
        linear = sorted({n.rsplit(".", 1)[-1] for n, module in modules.items() if isinstance(module, nn.Linear)})
        raise ValueError(
            f"`lora.targets`: {type(model).__name__} has no layers {missing or 'of attention'}. Linear layers:"
            f" {linear}."
        )
    for name in names:
        if type(modules[name]) is not nn.Linear or id(modules[name].weight) == tied:
            raise ValueError(
                f"`lora.targets`: {name} is not a linear layer with a weight of its own, so an adapter cannot be merged"
                " into it. Train embeddings with `train_embeddings`; a head tied to them is trained with them."
            )
    return names


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


def _trained_whole(model: PreTrainedModel, lora: LoRA) -> Iterator[nn.Parameter]:
    """Parameters that are trained as they are."""
    if lora.train_norms:
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                yield from module.parameters(recurse=False)
    if lora.train_embeddings:
        yield from model.get_input_embeddings().parameters()


def _set_partitioned(layer: Any) -> None:
    """Gives an adapter that ZeRO stage 3 cut up, before peft could set it, the initial values it should have."""
    parts = [layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight]
    if hasattr(parts[0], "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parts, modifier_rank=0):
            layer.reset_lora_parameters(_ADAPTER, True)


def merged_weights(weights: Mapping[str, Tensor], lora: LoRA) -> dict[str, Tensor]:
    """The state of the model without adapters that computes what the adapted one does.

    Needs neither peft nor the model. Weights with an adapter, W + alpha / rank * B A with B [O, R] and A [R, I], come
    out as float32, to be rounded once by whoever loads them.

    Args:
        weights: State of an adapted model, or of one that never was.
        lora: Its adapters.

    Returns:
        Tensors under the names of the model without adapters.
    """
    merged = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            one, other = (weights[f"{layer}.lora_{which}.{_ADAPTER}.weight"].float() for which in "BA")
            tensor = tensor.float() + lora.scale * (one @ other)
        merged[plain_name(name)] = tensor
    return merged


def plain_name(name: str) -> str:
    """The name that a parameter has in the model without adapters."""
    return name.replace(".base_layer.", ".")
