"""What a configuration asks for, looked at before anything is built: some mistakes show late, others badly."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry

from lightning_longrope.checkpoints import is_checkpoint, replaced_by
from lightning_longrope.reading import read_yaml

LARGEST_SEED = (1 << 32) - 1  # that of numpy

_FOUND_LATER = ("last", "best", "hpc", "registry")
"""Words for a checkpoint that Lightning finds itself."""


def check_files(words: Sequence[str]) -> None:
    """Refuses a configuration file that holds no options.

    Raises:
        ValueError: Naming the file.
    """
    pairs = [*zip(words, words[1:], strict=False), *(word.split("=", 1) for word in words if "=" in word)]
    for flag, path in pairs:
        if flag in ("-c", "--config") and os.path.isfile(path) and not isinstance(content := read_yaml(path), dict):
            raise ValueError(
                f"{path} must hold a mapping of options (`trainer:`, `model:`, `data:`), got"
                f" {'nothing' if content is None else type(content).__name__}."
            )


def check_seed(seed: int | bool | None) -> None:
    """Refuses a seed that numpy does not take.

    Raises:
        ValueError: If it is none.
    """
    if seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"The seed (`seed_everything`, --seed) must be from 0 to {LARGEST_SEED}, got {seed}.")


def check_numbers(trainer: Any) -> None:
    """Refuses values that Lightning takes and does not survive.

    Args:
        trainer: The ``trainer`` part of a configuration, as all that take ``trainer`` here.

    Raises:
        ValueError: Naming the first.
    """
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(
            f"`trainer.accumulate_grad_batches` must be at least 1, got {trainer.accumulate_grad_batches}."
        )
    names = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(trainer.strategy, str) and trainer.strategy not in names:
        some = ", ".join(name for name in names if "_find_unused_" not in name)
        raise ValueError(f"`trainer.strategy` must be a class or a name such as {some}; got {trainer.strategy!r}.")


def check_devices(trainer: Any) -> None:
    """Refuses what is no number of processes where there are no devices to choose from.

    Raises:
        ValueError: If it is not.
    """
    on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.cuda.is_available())
    devices = str(trainer.devices)
    if on_cpu and devices != "auto" and not (devices.isdecimal() and int(devices)):
        raise ValueError(
            f"`trainer.devices` must be a number of processes on a CPU, at least 1, or auto; got {trainer.devices!r}."
        )


def check_places(config: Any) -> None:
    """Refuses files and folders that are not there: it may be hours until they are opened.

    Raises:
        ValueError: Naming the first.
    """
    resumed = config.get("ckpt_path")
    if resumed and str(resumed).partition(":")[0] not in _FOUND_LATER:
        path = Path(resumed)
        if not path.exists() and not replaced_by(path).exists():
            raise ValueError(f"`--ckpt_path`: there is no {resumed}. Give a .ckpt of a run, or last.")
        if path.is_dir() and not is_checkpoint(path):
            what = "a model folder: give it as --model.name_or_path" if (path / "config.json").is_file() else "none"
            raise ValueError(
                f"`--ckpt_path` must be a checkpoint of a run (checkpoints/last.ckpt); {resumed} is {what}."
            )
    model = config.get("model") or {}
    given = {"--model.name_or_path": (model.get("init_args") or {}).get("name_or_path")}
    given |= {f"tuned.{name}": path for name, path in (config.get("tuned") or {}).items()}
    for option, name in given.items():
        if name is not None and is_place(name) and not Path(name).exists() and not replaced_by(Path(name)).exists():
            raise ValueError(f"`{option}`: there is no {name}. Give a model folder, a .ckpt or a hub name.")


def is_place(name: str) -> bool:
    """Whether a name of a model can only be a path, and no name on a hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".ckpt")
