"""Loads causal language models and their tokenizers from a hub, a folder, an export or a checkpoint of this package."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from lightning_longrope.attention import choose_attention, say_attention
from lightning_longrope.checkpoints import choose_accelerator, is_checkpoint, read_checkpoint
from lightning_longrope.collectives import is_broken_collective
from lightning_longrope.factors import FACTORS_FILE
from lightning_longrope.geometry import config_fields
from lightning_longrope.lora import LoRA, merged_weights
from lightning_longrope.model import install_factors
from lightning_longrope.out_of_memory import is_out_of_memory
from lightning_longrope.reading import blaming, is_plain_name, read_json_object, read_yaml
from lightning_longrope.tables import LengthTables

PRETRAINED_ROPE = "pretrained_rope"
"""Key of an exported config.json that keeps the rotary fields the model had before it was extended."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
"""Fields of a config that no model can do with 0 of."""

CUSTOM_CODE = "longrope"
"""Key of an exported config.json that code in the folder reads the tables from."""


def load_model(
    name_or_path: str | Path | None = None,
    *,
    config: dict[str, Any] | None = None,
    dtype: str | torch.dtype = "float32",
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model, with the rescale factors it was saved with installed.

    Args:
        name_or_path: A Hugging Face folder or hub name, or a checkpoint of ``LongRoPEModule``, whose ``lora`` adapters
            are merged: a ``.ckpt`` file, or the folder that DeepSpeed or FSDP2 writes.
        config: Instead of a name: fields of a config, ``model_type`` among them, for a model with random weights.
        dtype: Type of the weights, ``"float32"``, ``"bfloat16"`` or ``"float16"``, or a torch dtype.
        attn_implementation: Attention kernel; ``"auto"`` takes FlashAttention 2 where it is installed, there is a CUDA
            device and the type is a half one; otherwise torch's own (sdpa), or eager for models that have no other.
        trust_remote_code: Let a hub model run its own code.

    Returns:
        The model on the CPU, in evaluation mode if its weights were loaded and in training mode if they are random.

    Raises:
        ValueError: If not exactly one of the two sources is given, it cannot be loaded, or ``config`` has unknown keys.
    """
    if (name_or_path is None) == (config is None):
        raise ValueError("Give either a model's name or path, or a `config` for random weights.")
    kind = _dtype(dtype)
    choose_accelerator()
    kernel, reason = choose_attention(attn_implementation, kind)
    model = _loaded(name_or_path, config, {"dtype": kind, "attn_implementation": kernel}, trust_remote_code)
    say_attention(model, reason)
    return model


def _loaded(
    name_or_path: str | Path | None, config: dict[str, Any] | None, how: dict[str, Any], trust_remote_code: bool
) -> PreTrainedModel:
    """The model of one of the two sources."""
    if config is not None:
        made = new_config(config)
        with describing(made.model_type):
            return AutoModelForCausalLM.from_config(made, **how)
    path = Path(str(name_or_path))
    if is_checkpoint(path):
        return _load_checkpoint(path, how)
    with _loading("model", str(name_or_path)):
        if path.is_dir():
            _check_index(path)
            _check_size(path, trust_remote_code)
        if (path / FACTORS_FILE).is_file():
            return _load_exported(path, how, trust_remote_code)
        return _whole_model(str(name_or_path), trust_remote_code=trust_remote_code, **how)


def load_tokenizer(name_or_path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or hub name, or the one near a ``.ckpt``.

    Args:
        name_or_path: The folder, name or checkpoint.
        trust_remote_code: Let a hub tokenizer run its own code.

    Raises:
        ValueError: If there is none.
    """
    near = find_tokenizer(Path(name_or_path)) if is_checkpoint(Path(name_or_path)) else None
    with _loading("tokenizer", str(name_or_path)):
        # with None in place of False transformers would ask a person, and wait
        return AutoTokenizer.from_pretrained(near or str(name_or_path), trust_remote_code=trust_remote_code)


def _check_index(folder: Path) -> None:
    """Refuses an index of shards that names a file outside of its folder.

    Raises:
        ValueError: If it does.
    """
    for path in folder.glob("*.index.json"):
        shards = read_json_object(path).get("weight_map", {})
        if not isinstance(shards, dict):
            raise ValueError(f"{path} must have a mapping of weights to files as `weight_map`.")
        for name in shards.values():
            if not is_plain_name(name):
                raise ValueError(f"{path} must name files beside it, got {name!r}.")


def _check_size(folder: Path, trust_remote_code: bool) -> None:
    """Refuses a config of far more weights than its files hold, before transformers fills them with random numbers.

    Raises:
        ValueError: If embeddings and one matrix a layer alone were 16 times the files' bytes; weights take 1/4 or more.
    """
    held = sum(path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
    if not held or (folder / "adapter_config.json").is_file():  # adapters, of a model elsewhere
        return
    fields = config_fields(AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code))
    names = ("hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size")
    width, words, layers, inner = (max(0, value) if type(value := fields.get(name)) is int else 0 for name in names)
    least = width * words + layers * max(1, width) * max(1, inner)
    if least > 16 * held:
        raise ValueError(f"config.json describes {least:,} weights or more, but its files hold {held:,} bytes")


def _whole_model(name_or_path: str, **options: Any) -> PreTrainedModel:
    """The pretrained model of a name or folder.

    Raises:
        ValueError: If its files lack weights, which transformers makes at random, or have layers that it leaves out.
    """
    model, found = AutoModelForCausalLM.from_pretrained(name_or_path, output_loading_info=True, **options)
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    lacking = sorted(weights.intersection(found["missing_keys"]))
    # Of the lists of layers in the model: a vision tower may be left out, and the buffers of old versions.
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    lost = sorted(name for name in found["unexpected_keys"] if _in_list(name) in lists)
    for what, names in (("lack", lacking), ("hold, beyond what config.json describes,", lost)):
        if names:
            raise ValueError(f"its files {what} {len(names)} weights, {names[0]} among them")
    return model


def _in_list(name: str) -> str | None:
    """The list of layers a weight is in, ``model.layers`` of ``model.layers.3.norm.weight``; None if it is in none."""
    found = re.match(r"(.*?)\.\d+\..*(\.weight|proj\.bias)$", name)
    return found and found[1]


def find_tokenizer(checkpoint: Path) -> str | None:
    """The tokenizer in a model folder, or the one that the run around a checkpoint has made or was given."""
    places = ("tokenizer_config.json", "data/tokenizer-*/tokenizer_config.json")
    folders = (checkpoint, *checkpoint.absolute().parents[:3])
    near = next((str(path.parent) for folder in folders for place in places for path in folder.glob(place)), None)
    return near or _given_tokenizer(checkpoint)


def _given_tokenizer(checkpoint: Path) -> str | None:
    """The tokenizer that the configuration around a checkpoint names, or that of the model it names."""
    paths = [folder / "config.yaml" for folder in checkpoint.absolute().parents[:2]]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        return None
    with blaming(f"Cannot tell the tokenizer from {found}"):
        config = read_yaml(found)
        data, model = ((config.get(part) or {}).get("init_args") or {} for part in ("data", "model"))
        name: str | None = data.get("tokenizer") or model.get("name_or_path")
    return find_tokenizer(Path(name)) if name and Path(name).exists() else name


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Makes one line of whatever transformers and its libraries, which have many kinds of errors, meet in a folder."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or is_broken_collective(error):
            raise
        raise ValueError(_cannot_load(what, name, error)) from error


def _cannot_load(what: str, name: str, error: Exception) -> str:
    """One line on a name that leads nowhere."""
    if not name.strip():
        return f"Cannot load a {what} from {name!r}: give a folder, a checkpoint or a hub name."
    if Path(name).is_file() and not is_checkpoint(Path(name)):
        return f"Cannot load a {what} from {name!r}: it is a file; expected a folder, a checkpoint or a hub name."
    if Path(name).is_dir():
        tried = "it is a folder, but not one that transformers can load"
    else:
        tried = "there is no such folder here, and as a hub name it did not resolve"
    cause = next(iter(str(error).strip().splitlines()), "") if isinstance(error, OSError | ValueError) else repr(error)
    return f"Cannot load a {what} from {name!r}: {tried} ({cause.rstrip('.')})."


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name."""
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"`dtype` must be the name of a floating type such as 'float32' or 'bfloat16', got {dtype!r}.")
    return kind


def new_config(entries: dict[str, Any]) -> Any:
    """A config object from its fields.

    Raises:
        ValueError: If the model type is missing or unknown, or a field is unknown to it.
    """
    rest = dict(entries)
    model_type = rest.pop("model_type", None)
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ValueError(f"`config` needs a `model_type` that transformers knows, got {model_type!r}.") from error
    known = set(default.to_dict()) | {"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "head_dim"}
    known |= {field.name for field in fields(default)} if is_dataclass(default) else set()
    if unknown := sorted(set(rest) - known):
        raise ValueError(f"`config` has keys that a {model_type} model does not know: {', '.join(unknown)}.")
    for name in _SIZES:
        if (size := rest.get(name)) is not None and (type(size) is not int or size < 1):
            raise ValueError(f"`config.{name}` must be a whole number of at least 1, got {size!r}.")
    with describing(model_type):
        return AutoConfig.for_model(model_type, **rest)


@contextmanager
def describing(model_type: str) -> Iterator[None]:
    """Makes one line of whatever keeps transformers from building a model of a config.

    Raises:
        ValueError: With the cause.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or is_broken_collective(error):
            raise
        cause = error if error.__cause__ is None else error.__cause__  # the classes of configs wrap what they find
        first = next(iter(str(cause).strip().splitlines()), "")
        said = first if isinstance(cause, ValueError) else f"{type(cause).__name__}: {first}"
        raise ValueError(f"`config` describes no {model_type} model that can be built: {said.rstrip('.')}.") from error


def _load_exported(path: Path, how: dict[str, Any], trust_remote_code: bool) -> PreTrainedModel:
    """A folder written by ``export_model``: the pretrained model it came from plus its exact table."""
    factors = LengthTables.load(path / FACTORS_FILE, monotone=False)
    config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    if hasattr(config.get_text_config(), CUSTOM_CODE):
        del config.auto_map  # to code that says in other words what is installed here
    _undo_rescaling(config.get_text_config())
    model = _whole_model(str(path), config=config, trust_remote_code=trust_remote_code, **how)
    install_factors(model, factors)
    return model


def _undo_rescaling(config: Any) -> None:
    """Makes a config that of the pretrained model again, so that identity factors give that model."""
    pretrained = getattr(config, PRETRAINED_ROPE, None)
    if pretrained is None:  # someone put a table next to a stock model
        return
    for name in (PRETRAINED_ROPE, CUSTOM_CODE):
        if hasattr(config, name):
            delattr(config, name)
    for name, value in pretrained.items():
        setattr(config, name, value)


def _load_checkpoint(path: Path, how: dict[str, Any]) -> PreTrainedModel:
    """The model of a checkpoint written by ``LongRoPEModule``."""
    partitioned = is_deepspeed_zero3_enabled()  # while it is read, from the values of the first rank
    saved, weights = read_checkpoint(path, values=not partitioned or torch.distributed.get_rank() == 0)
    with _loading("model", str(path)):
        return _of_checkpoint(saved, weights, partitioned, how)


def _of_checkpoint(
    saved: dict[str, Any], weights: dict[str, Tensor], partitioned: bool, how: dict[str, Any]
) -> PreTrainedModel:
    """The model of what a checkpoint holds."""
    entries = dict(saved["config"])
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    if (adapters := saved.get("lora")) is not None:
        weights = merged_weights(weights, LoRA(**adapters))
    if partitioned:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = kind.from_pretrained(None, config=config, state_dict=weights, **how)
    else:
        model = AutoModelForCausalLM.from_config(config, **how)
        model.load_state_dict(weights, strict=True)
    if saved["factors"] is not None:
        install_factors(model, LengthTables.from_dict(saved["factors"]))
    return model.eval()
