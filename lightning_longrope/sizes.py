"""The geometry of a model from its config, without a weight: what ``estimate`` counts with."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_longrope.checkpoints import is_checkpoint, read_entry
from lightning_longrope.estimate import ModelSize
from lightning_longrope.geometry import config_fields
from lightning_longrope.layers import decoder_layers
from lightning_longrope.loading import describing, new_config
from lightning_longrope.lora import LoRA, add_adapters
from lightning_longrope.sliding import sliding_window


def read_config(
    name_or_path: str | Path | None, config: dict[str, Any] | None = None, trust_remote_code: bool = False
) -> Any:
    """The Hugging Face config of what ``load_model`` would load.

    Raises:
        ValueError: If there is none.
    """
    if config is not None:
        return new_config(config)
    path = Path(str(name_or_path))
    entries = dict(read_entry(path)["config"]) if is_checkpoint(path) else None
    if not str(name_or_path).strip() or (entries is None and path.is_file()):
        given = "a file" if path.is_file() else "empty"
        raise ValueError(f"The model {str(name_or_path)!r} is {given}: expected a folder, a checkpoint or a hub name.")
    try:
        if entries is not None:
            return AutoConfig.for_model(entries.pop("model_type"), **entries)
        return AutoConfig.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
    except Exception as error:  # those of the libraries that check a config are of many kinds
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"Cannot read the config of the model {str(name_or_path)!r}: {first}") from error


def model_size(config: Any, lora: LoRA | None = None, trust_remote_code: bool = False) -> ModelSize:
    """Counts a model's parameters and reads its widths.

    Args:
        config: Config of a Hugging Face causal language model.
        lora: Adapters it is to get.
        trust_remote_code: Let a hub model run its own code.
    """
    with torch.device("meta"), describing(config.model_type):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
    if lora is not None:
        add_adapters(model, lora)
    layers, fields, slides = decoder_layers(model), config_fields(config), sliding_window(config)
    chosen, heads = _experts(fields), fields["num_attention_heads"]
    head_size = fields.get("head_dim") or fields["hidden_size"] // heads
    inside = [(name, p.numel()) for name, p in layers.named_parameters()]
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        per_token=round(sum(count * (chosen if ".experts." in name else 1) for name, count in inside)),
        layers=len(layers),
        hidden=fields["hidden_size"],
        mlp=_mlp_width(fields),
        query=heads * head_size,
        keys=(fields.get("num_key_value_heads") or heads) * head_size,
        vocabulary=fields["vocab_size"],
        heads=heads,
        windows=(slides.length,) * slides.layers if slides else (),
    )


def _experts(fields: dict[str, Any]) -> float:
    """Share of the experts that a token goes through."""
    count = fields.get("num_local_experts") or fields.get("num_experts") or fields.get("n_routed_experts")
    return fields["num_experts_per_tok"] / count if count else 1.0


def _mlp_width(fields: dict[str, Any]) -> int:
    """Width of the MLP that a token goes through: of the experts chosen for it, and of those that all tokens share."""
    names = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
    width = next((fields[name] for name in names if fields.get(name)), 4 * fields["hidden_size"])
    if experts := fields.get("num_experts_per_tok"):
        shared = fields.get("n_shared_experts") or fields.get("moe_num_shared_experts") or 0
        width = (experts + shared) * (fields.get("moe_intermediate_size") or width)
        width += fields.get("shared_expert_intermediate_size") or 0
    return int(width)
