"""What a model's config says about its rotary embedding, read from a config object or a raw ``config.json``.

Hugging Face moved these numbers several times (``rope_theta`` and ``rope_scaling``, then ``rope_parameters``, then one
entry for each layer type), and every user of them here must read them in the same way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST_HEAD = 1 << 16  # channels; anything beyond is a damaged config that would fill the memory
LAYER_TYPE = "full_attention"  # the layers that are rescaled where a model has several kinds (Gemma 3)


@dataclass(frozen=True)
class RopeGeometry:
    """Size, base and pretrained window of a rotary embedding."""

    rotary_size: int
    """R, the number of head channels that rotate."""
    base: float
    """Base of the geometric progression of speeds (``rope_theta``)."""
    original_length: int
    """L, the pretrained window in tokens."""

    @property
    def pairs(self) -> int:
        """F, the number of frequency pairs, which is the number of rescale factors."""
        return self.rotary_size // 2


def config_fields(config: Any) -> dict[str, Any]:
    """The fields of the language model in a config object, a raw config dict or a multimodal config of either kind."""
    fields = dict(config) if isinstance(config, Mapping) else config.get_text_config().to_dict()
    text = fields.get("text_config")
    return dict(text) if isinstance(text, Mapping) else fields


def rope_parameters(config: Any) -> dict[str, Any]:
    """The ``rope_parameters`` of the layers that are rescaled, in today's form whatever the age of the config.

    Args:
        config: A Hugging Face config object, or the dict of a ``config.json``.

    Returns:
        A new dict with at least ``rope_type`` and ``rope_theta``.

    Raises:
        ValueError: If the model has no rotary embedding, or none on full-attention layers.
    """
    fields = config_fields(config)
    parameters = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in parameters.values()):
        if not parameters.get(LAYER_TYPE):
            raise ValueError(f"No rotary embedding on `{LAYER_TYPE}` layers: its layer types are {list(parameters)}.")
        parameters = dict(parameters[LAYER_TYPE])
    parameters["rope_type"] = parameters.get("rope_type") or parameters.pop("type", None) or "default"
    for name, older in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        value = next((v for v in (parameters.get(name), fields.get(name), fields.get(older)) if v is not None), None)
        if value is not None:
            parameters[name] = value
    if "rope_theta" not in parameters:
        raise ValueError(
            f"The model (model_type={fields.get('model_type')!r}) has no rotary embedding: its config gives no"
            " `rope_theta`. Only models with RoPE can be extended."
        )
    return parameters


def rope_geometry(config: Any) -> RopeGeometry:
    """Rotary size, base and pretrained window of a model.

    Args:
        config: A Hugging Face config object, or the dict of a ``config.json``. Of models with several layer types
            (Gemma 3) the full-attention layers count.

    Returns:
        The geometry. The pretrained window is ``original_max_position_embeddings`` where the config has one, never more
        than ``max_position_embeddings``.

    Raises:
        ValueError: If the model has no rotary embedding or the config does not say how large it is.
    """
    fields, parameters = config_fields(config), rope_parameters(config)
    head_size = fields.get("head_dim")
    if head_size is None:
        if not (fields.get("hidden_size") and fields.get("num_attention_heads")):
            raise ValueError("The config gives neither `head_dim` nor `hidden_size` and `num_attention_heads`.")
        head_size = fields["hidden_size"] // fields["num_attention_heads"]
    original = parameters.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")
    longest = fields.get("max_position_embeddings")
    windows = [int(window) for window in (original, longest) if window]
    if not windows:
        raise ValueError("The config gives no `max_position_embeddings`, so the pretrained window is unknown.")
    rotary_size = int(head_size * parameters.get("partial_rotary_factor", 1.0))
    if not 2 <= rotary_size <= LARGEST_HEAD:
        raise ValueError(f"The config gives {rotary_size} channels of a head that rotate, not 2 to {LARGEST_HEAD}.")
    return RopeGeometry(
        rotary_size=rotary_size,
        base=float(parameters["rope_theta"]),
        # Phi-3 configs have original_max_position_embeddings=4096 whatever their window
        original_length=min(windows),
    )


def set_pretrained_window(config: Any, length: int) -> None:
    """Corrects the pretrained window in a model's config, in place.

    Mistral-7B-v0.1 says 32,768 tokens, but no layer has ever attended to more than 4,096 (Phi-3-mini: 2,048), so those
    are all the distances its positions have learnt.

    Args:
        config: Hugging Face config of the model.
        length: Window that was pretrained, in tokens.

    Raises:
        ValueError: If the length is not positive.
    """
    if length < 1:
        raise ValueError(f"`original_length` must be at least 1 token, got {length}.")
    text = config.get_text_config()
    text.max_position_embeddings = length
    if getattr(text, "original_max_position_embeddings", None):
        text.original_max_position_embeddings = length
