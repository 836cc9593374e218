"""Readers of models: checkpoints, Hugging Face folders, tokenizers."""

import io
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from helpers import LLAMA
from small_tokenizers import byte_level

from fuzzing.reader import Reader, unchanged
from fuzzing.searches import TABLE
from lightning_longrope.checkpoints import read_checkpoint
from lightning_longrope.loading import load_model, load_tokenizer

SMALL: dict[str, Any] = {**LLAMA, "vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
ENTRY = {"config": SMALL, "factors": TABLE.to_dict()}
WEIGHTS = {"model.a": torch.arange(12.0).reshape(3, 4), "model.b": torch.ones(2, dtype=torch.bfloat16)}


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@cache
def _distributed() -> dict[str, bytes]:
    """A folder as FSDP2 writes it."""
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            torch.distributed.checkpoint.save({"state_dict": WEIGHTS}, checkpoint_id=folder, no_dist=True)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return {**files, "meta.pt": _pickled({"longrope": ENTRY})}


@cache
def _model_folder() -> dict[str, bytes]:
    """A Hugging Face folder with its tokenizer, in two shards."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        load_model(config=SMALL).save_pretrained(folder, max_shard_size="3KB")
        byte_level().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _writer(files: Callable[[], dict[str, bytes]]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        shutil.rmtree(folder / "saved", ignore_errors=True)
        (folder / "saved").mkdir(parents=True)
        for name, data in files().items():
            (folder / "saved" / name).write_bytes(data)

    return write


def _deepspeed(folder: Path) -> None:
    (folder / "saved" / "checkpoint").mkdir(parents=True, exist_ok=True)
    (folder / "saved" / "latest").write_text("checkpoint")
    (folder / "saved" / "checkpoint" / "mp_rank_00_model_states.pt").write_bytes(_stage_0()[0])


def _stage_0() -> list[bytes]:
    return [_pickled({"longrope": ENTRY, "module": WEIGHTS})]


def _state(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(path).state_dict())


def judge_shards(data: bytes, value: dict[str, torch.Tensor], intact: list[Any]) -> None:
    """Nothing covers weights in safetensors; what is read of them is what safetensors reads by itself."""
    from safetensors.torch import load

    for name, weight in load(data).items():
        assert value[name].numpy().tobytes() == weight.numpy().tobytes()


INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00004.safetensors"

MODELS = [
    Reader("checkpoint (.ckpt)", "a.ckpt", lambda: [_pickled({"longrope": ENTRY, "state_dict": WEIGHTS})],
           read_checkpoint, unchanged),
    Reader("checkpoint (DeepSpeed)", "saved/checkpoint/mp_rank_00_model_states.pt", _stage_0,
           lambda path: read_checkpoint(path.parents[1]), unchanged, _deepspeed, names=("saved",)),
    Reader("checkpoint (DeepSpeed, latest)", "saved/latest", lambda: [b"checkpoint"],
           lambda path: read_checkpoint(path.parent), unchanged, _deepspeed, names=("saved",)),
    *(Reader(f"checkpoint (FSDP2, {name})", f"saved/{name}", lambda name=name: [_distributed()[name]],
             lambda path: read_checkpoint(path.parent), unchanged, _writer(_distributed), 10, ("saved",))  # type: ignore[misc]
      for name in (".metadata", "__0_0.distcp", "meta.pt")),
    *(Reader(f"model folder ({name})", f"saved/{name}", lambda name=name: [_model_folder()[name]],
             lambda path: _state(path.parent), judge, _writer(_model_folder), 40, ("saved",))  # type: ignore[misc]
      for name, judge in (("config.json", unchanged), (INDEX, unchanged), (SHARD, judge_shards))),
    *(Reader(f"tokenizer ({name})", f"saved/{name}", lambda name=name: [_model_folder()[name]],
             lambda path: len(load_tokenizer(path.parent)), prepare=_writer(_model_folder), slow=40, names=("saved",))  # type: ignore[misc]
      for name in ("tokenizer.json", "tokenizer_config.json")),
]  # fmt: skip
