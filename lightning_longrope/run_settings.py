"""What a run does to need less memory, read from its configuration or from a trainer at work."""

from collections.abc import Mapping
from typing import Any

from lightning_longrope.estimate import Precision
from lightning_longrope.levers import Levers

_OWN = "lightning_longrope.strategies"


def levers_of(strategy: Any, model: Mapping[str, Any], devices: int, heads: int) -> Levers:
    """The savings of a configuration.

    Args:
        strategy: ``trainer.strategy``: a name, or a mapping with ``class_path`` and ``init_args``.
        model: ``init_args`` of the model.
        devices: Number of ranks.
        heads: Attention heads of the model.

    Raises:
        ValueError: If ``sequence_parallel_size`` does not divide ranks and heads.
    """
    named = isinstance(strategy, Mapping)
    path, arguments = (strategy["class_path"], strategy.get("init_args") or {}) if named else (strategy, {})
    memory = model.get("memory") or {}
    ranks = arguments.get("sequence_parallel_size") or 1
    if devices % ranks or heads % ranks:
        raise ValueError(
            f"`sequence_parallel_size` ({ranks}) must divide the number of GPUs ({devices}) and of attention heads"
            f" ({heads}): change it, or --gpus and --nodes."
        )
    return Levers(
        **_sharding(str(path), arguments, devices),
        own=str(path).startswith(_OWN),
        devices=devices,
        heads=heads,
        sequence_parallel_size=ranks,
        gradient_checkpointing=bool(model.get("gradient_checkpointing")),
        offload_activations=bool(memory.get("offload_activations")),
        mlp_tile=memory.get("mlp_tile"),
    )


def _sharding(path: str, arguments: Mapping[str, Any], devices: int) -> dict[str, Any]:
    """Kind of strategy, ZeRO stage and what it offloads."""
    name = path.rsplit(".", 1)[-1].lower()
    if "deepspeed" in name:
        zero = arguments.get("config")
        zero = zero.get("zero_optimization", {}) if isinstance(zero, Mapping) else {}
        stage = next((int(word) for word in name.split("_") if word.isdecimal()), 2)
        stage = zero.get("stage", arguments.get("stage", stage))
        offload = name.endswith("_offload")
        return {
            "strategy": "deepspeed",
            "zero_stage": stage,
            "offload_optimizer": bool(arguments.get("offload_optimizer") or offload or "offload_optimizer" in zero),
            "offload_parameters": stage == 3
            and bool(arguments.get("offload_parameters") or offload or "offload_param" in zero),
        }
    if "fsdp" in name or "modelparallel" in name:
        return {"strategy": "fsdp2", "zero_stage": 3}
    return {"strategy": "ddp" if "ddp" in name or devices > 1 else "single"}


def precision_of(
    strategy: str, precision: Any, dtype: str, lora: Mapping[str, Any] | None
) -> tuple[Precision, int, int, int]:
    """What numbers are made of.

    Args:
        strategy: Kind of strategy.
        precision: ``trainer.precision``.
        dtype: ``dtype`` of the model.
        lora: Adapters, which are float32 beside half weights.

    Returns:
        Kind of precision, bytes of a weight, of a gradient, and of the float32 copy that DeepSpeed keeps.
    """
    name = str(precision or "32-true")
    half_weights = dtype not in ("float32", "float64")
    if strategy == "deepspeed" and "16" in name:
        return "half", 2, 2, 4
    if name.endswith("16-true"):
        return "half", 2, 2, 0
    if half_weights:
        stream: Precision = "mixed" if lora and lora.get("train_embeddings") else "half"
        return stream, 2, 4 if lora else 2, 0
    return ("mixed", 4, 4, 0) if "16" in name else ("full", 4, 4, 0)


def optimizer_bytes(optimizer: Mapping[str, Any] | None, state: int) -> int:
    """Bytes of optimizer states per weight.

    Args:
        optimizer: ``class_path`` and ``init_args``.
        state: Bytes of a number in them.
    """
    name = str((optimizer or {}).get("class_path", "AdamW")).rsplit(".", 1)[-1]
    if name == "SGD":
        return state if (optimizer or {}).get("init_args", {}).get("momentum") else 0
    return state if "Muon" in name else 2 * state
