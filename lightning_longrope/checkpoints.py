"""Checkpoints of a ``LongRoPEModule`` as one state dict on the CPU, whichever strategy has written them.

One file (DDP, one device), a DeepSpeed folder (ZeRO 0 to 3, any number of ranks) or a distributed checkpoint of torch
(FSDP2). Nothing in a file is run: what is no tensor, number, text or collection of these is refused, but for a few
known classes of DeepSpeed and torch.
"""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from typing_extensions import override

from lightning_longrope.collectives import is_broken_collective
from lightning_longrope.out_of_memory import is_out_of_memory
from lightning_longrope.reading import MALFORMED, is_plain_name, read_text

_WEIGHTS_PREFIX = "model."  # of the model inside a LongRoPEModule
_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
_METADATA, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_TORCH = {
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),  # as Python 3.13 names them
    ("pathlib._local", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_FILESYSTEM, "_StorageInfo"),
}


def is_checkpoint(path: Path) -> bool:
    """Whether a path is, or by its name should be, a checkpoint and no model folder."""
    return path.suffix == ".ckpt" or is_deepspeed(path) or is_distributed(path)


def read_checkpoint(path: Path, values: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint written by ``LongRoPEModule`` holds of its model.

    Args:
        path: A ``.ckpt`` file, or the folder that DeepSpeed or FSDP2 has written in its place.
        values: Whether the values of the weights are wanted; else some may be anything, where that spares memory.

    Returns:
        The ``longrope`` entry (``config`` and ``factors``), and the weights by their names in the model: the float32
        masters where ZeRO keeps such, else as they were trained.

    Raises:
        ValueError: If there is no such checkpoint, another module has written it, or it is not whole or not safe.
    """
    extra = _read_extra(path)
    if values and _is_first_of_node():
        for file in _archives(path):
            _check_whole(file)
    if is_deepspeed(path):
        weights = _read_deepspeed(path, extra, values)
    elif is_distributed(path):
        weights = _read_distributed(path, values)
    else:
        weights = extra.get("state_dict", {})
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{path} is damaged, or no checkpoint: it has no weights.")
    return extra["longrope"], {
        name.removeprefix(_WEIGHTS_PREFIX): tensor
        for name, tensor in weights.items()
        if name.startswith(_WEIGHTS_PREFIX)
    }


def read_entry(path: Path) -> dict[str, Any]:
    """The ``longrope`` entry of a checkpoint, of which no weight is read.

    Raises:
        ValueError: As ``read_checkpoint``.
    """
    entry: dict[str, Any] = _read_extra(path)["longrope"]
    return entry


def saved_step(path: Path) -> int:
    """After how many optimizer steps a checkpoint was saved.

    Raises:
        ValueError: As ``read_checkpoint``.
    """
    step = _read_extra(path).get("global_step")
    if not isinstance(step, int):
        raise ValueError(f"{path} is damaged, or no checkpoint of a Trainer: it does not say its step.")
    return step


def _read_extra(path: Path) -> dict[str, Any]:
    """What Lightning has saved beside the weights; in a single file these too, mapped and not read."""
    put_back(path)
    if is_deepspeed(path):
        extra = _load(_model_files(path)[0])
    elif is_distributed(path):
        extra = _load(path / "meta.pt")
    elif path.is_file():
        extra = _load(path)
    else:
        raise ValueError(f"No checkpoint at {path}: expected a file, or a folder written by DeepSpeed or FSDP2.")
    if not isinstance(extra, dict) or not isinstance(extra.get("longrope"), dict):
        raise ValueError(f"{path} was not written by LongRoPEModule: it has no `longrope` entry.")
    return dict(extra)


def replaced_by(path: Path) -> Path:
    """Where the earlier checkpoint lies for the moment in which a new one takes its place."""
    return path.with_name(f".{path.name}.replaced")


def put_back(path: Path) -> None:
    """Puts an earlier checkpoint back whose run was killed in the moment in which a new one took its place."""
    if not path.exists():
        with suppress(FileNotFoundError, NotADirectoryError):  # there is none, or another process was faster
            replaced_by(path).rename(path)


def put_back_all(folder: Path) -> None:
    """``put_back`` for every checkpoint of a folder."""
    before, _, after = replaced_by(folder / "*").name.partition("*")
    for replaced in folder.glob(f"{before}*{after}"):
        put_back(folder / replaced.name.removeprefix(before).removesuffix(after))


def saved_ranks(path: Path) -> int:
    """Over how many ranks the optimizer states of a DeepSpeed folder are partitioned; 0 if they are not."""
    return len(list(_tag_folder(path).glob("*_optim_states.pt")))


def saved_stages(path: Path) -> tuple[int, ...]:
    """The ZeRO stages under which a DeepSpeed folder can be resumed."""
    if not (_tag_folder(path) / "mp_rank_00_model_states.pt").is_file():
        return (3,)
    return (1, 2) if saved_ranks(path) else (0,)


def convert_to_universal(path: Path, folder: Path) -> str:
    """Writes a DeepSpeed folder in the form that any number of ranks can resume from, in a process of its own.

    Args:
        path: The checkpoint.
        folder: Folder to write, named like the tag it stands for.

    Returns:
        The last line of what went wrong; empty if nothing did.

    Raises:
        ValueError: If the checkpoint is not safe to read.
    """
    check_safe(path)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(_tag_folder(path)), "--output_folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def universal_groups(folder: Path) -> list[dict[str, Any]]:
    """Settings of every group of an optimizer, from the folder that ``convert_to_universal`` has written."""
    file = folder / "zero" / "optimizer_state.pt"
    _check_file(file)
    state = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
    return list(state["param_groups"])


def check_safe(path: Path) -> None:
    """Refuses a DeepSpeed folder with objects that DeepSpeed, which unpickles without restrictions, would run.

    Raises:
        ValueError: If there are any but tensors, numbers, texts, collections and the known classes of DeepSpeed.
    """
    for file in sorted(_tag_folder(path).glob("*_states.pt")):
        _check_file(file)


def check_resumable(path: Path) -> None:
    """Refuses to resume from a checkpoint of any kind in which there is code to run, before anything reads it.

    Whoever resumes may unpickle without restrictions: DeepSpeed, the index of torch's distributed checkpoints, and
    Lightning before 2.6.

    Raises:
        ValueError: If there is any, or the checkpoint is damaged.
    """
    if is_deepspeed(path):
        check_safe(path)
    elif is_distributed(path):
        _read_index(path)
        _check_file(path / "meta.pt")
    elif path.is_file():
        _check_file(path)


def _check_file(file: Path) -> None:
    with _reading(file):
        unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - _DEEPSPEED
    if unknown:
        raise ValueError(f"{file} holds objects that are not safe to read: {', '.join(sorted(unknown))}.")


def choose_accelerator() -> None:
    """Tells DeepSpeed, before it is imported, to take the processor where there is no GPU: else it warns."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def is_deepspeed(path: Path) -> bool:
    """Whether a path is a folder that DeepSpeed has written."""
    return (path / "latest").is_file()


def _tag_folder(path: Path) -> Path:
    """The folder that ``latest`` names, which is one inside."""
    name = read_text(path / "latest", 4096).strip()
    if not is_plain_name(name):
        raise ValueError(f"{path / 'latest'} must name a folder beside it, got {name!r}.")
    return path / name


def is_distributed(path: Path) -> bool:
    """Whether a path is a distributed checkpoint of torch, as FSDP2 writes it, with what its first rank writes."""
    return (path / ".metadata").is_file()


def _load(path: Path) -> Any:
    with _reading(path):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            _check_file(path)  # says what there is, where torch advises to load it all the same
            raise


_TORN = (RuntimeError, pickle.PickleError, EOFError, OSError, struct.error, zlib.error, zipfile.BadZipFile)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Makes one line of the many errors with which torch meets a damaged file."""
    try:
        yield
    except (*_TORN, *MALFORMED) as error:
        if is_out_of_memory(error) or is_broken_collective(error):
            raise
        raise _damaged(path, error) from error
    except CheckpointException as error:  # which is no Exception
        raise _damaged(path, next(iter(error.failures.values()))[0]) from error


def _damaged(path: Path, error: BaseException) -> ValueError:
    cause = next(iter(str(error).splitlines()), "") or type(error).__name__
    return ValueError(f"{path} is damaged, or no checkpoint: {cause.rstrip('.')}.")


def _archives(path: Path) -> list[Path]:
    """The files that hold weights, or settings; torch compares no checksum of them."""
    if is_deepspeed(path):
        return sorted(_tag_folder(path).glob("*_states.pt"))
    return [path / "meta.pt" if is_distributed(path) else path]


def _is_first_of_node() -> bool:
    """Whether this process is the one that compares checksums, so that not each of a node reads every file again."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def _check_whole(file: Path) -> None:
    """Compares what a file holds with the CRC-32 that torch has saved: what a disk has changed is a number too.

    Raises:
        ValueError: If it differs.
    """
    with _reading(file), zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{file} is damaged: the checksum of {damaged} is another.")


def _model_files(path: Path) -> list[Path]:
    folder = _tag_folder(path)
    files = sorted(folder.glob("*_model_states.pt"))
    if not files:
        raise ValueError(f"{path} is not whole: it has no *_model_states.pt in {folder.name}.")
    return files


def _read_deepspeed(path: Path, extra: dict[str, Any], values: bool) -> dict[str, Tensor]:
    """The weights of a DeepSpeed folder."""
    if not saved_ranks(path):  # stage 0
        weights: dict[str, Tensor] = extra.get("module", {})
        return weights
    check_safe(path)
    choose_accelerator()
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint, to_torch_tensor
    except ImportError as error:
        raise ValueError(
            f"{path} is a DeepSpeed checkpoint, which needs DeepSpeed: pip install lightning-longrope[deepspeed]."
        ) from error
    with _reading(path), redirect_stdout(io.StringIO()):  # it prints
        # unpickles without restrictions, hence the check above
        state = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=_tag_folder(path).name, lazy_mode=True)
        tensors: dict[str, Tensor] = to_torch_tensor(state, return_empty_tensor=not values)
        return tensors


def _read_distributed(path: Path, values: bool) -> dict[str, Tensor]:
    """The weights of a distributed checkpoint of torch, without its optimizer states."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    metadata = _read_index(path)
    with _reading(path / ".metadata"):
        keys = {key: names[1] for key, names in metadata.planner_data.items() if names[0] == "state_dict"}
        found = {name: metadata.state_dict_metadata[key] for key, name in keys.items()}
    if pickled := sorted(name for name, kind in found.items() if not isinstance(kind, TensorStorageMetadata)):
        raise ValueError(f"{path} holds weights that are not safe to read, being no tensors: {', '.join(pickled)}.")
    with _reading(path):
        if not values:
            return {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in found.items()}
        if _is_first_of_node():
            _check_parts(path, metadata, {key: found[name] for key, name in keys.items()})
        loaded: dict[str, Any] = {}
        planner = _EmptyStateDictLoadPlanner(keys={"state_dict"})
        _load_state_dict(loaded, storage_reader=FileSystemReader(path), planner=planner, no_dist=True)
        return dict(loaded["state_dict"])


def _check_parts(path: Path, metadata: Any, weights: dict[str, Any]) -> None:
    """Compares every part of the weights with its CRC-32; torch does not, nor does it see whether parts are missing.

    Args:
        path: The checkpoint.
        metadata: Its index.
        weights: The tensors that will be read, by the names that they have in the index.

    Raises:
        ValueError: If a checksum differs, or the parts of a tensor are more or less than the whole.
    """
    for name, tensor in weights.items():
        if not _is_covered(tensor):
            raise ValueError(f"the parts of {name} are not the whole of {tuple(tensor.size)}")
    for index, part in metadata.storage_data.items():
        if index.fqn in weights:
            with (path / part.relative_path).open("rb") as file:
                file.seek(part.offset)
                content = io.BytesIO(file.read(part.length))
            with zipfile.ZipFile(content) as archive:
                if archive.testzip() is not None:
                    raise ValueError(f"the checksum of {index.fqn} in {part.relative_path} is another")


def _is_covered(tensor: TensorStorageMetadata) -> bool:
    inside = all(
        0 <= start <= start + length <= most
        for chunk in tensor.chunks
        for start, length, most in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
    )
    return inside and sum(chunk.sizes.numel() for chunk in tensor.chunks) == tensor.size.numel()


def _read_index(path: Path) -> Any:
    """The index of a distributed checkpoint.

    Raises:
        ValueError: If it is damaged, has code to run, or names a file outside of the checkpoint.
    """
    file = path / ".metadata"
    with _reading(file), file.open("rb") as index:
        try:
            metadata = _Index(index).load()  # torch unpickles it without restrictions
        except MemoryError as error:  # of a length that a text in it claims to have
            raise _damaged(file, error) from error
        names = {part.relative_path for part in metadata.storage_data.values()}
    if outside := sorted(repr(name) for name in names if not is_plain_name(name)):
        raise ValueError(f"{file} must name files beside it, got {outside[0]}.")
    return metadata


class _Index(pickle.Unpickler):
    """Unpickles what describes tensors, and refuses anything else."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _TORCH or (module == "torch" and isinstance(vars(torch).get(name), torch.dtype))
        if not known:
            raise ValueError(f"The checkpoint's index holds an object that is not safe to read: {module}.{name}.")
        return super().find_class(module, name)
