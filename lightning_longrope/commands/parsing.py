"""What the commands share: how their words are parsed."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from typing_extensions import override

from lightning_longrope.checking import LARGEST_SEED
from lightning_longrope.datamodules.base import TokenDataModule


class Parser(argparse.ArgumentParser):
    """Parser whose errors are ``ValueError``, so that ``run_command`` makes one line of them."""

    @override
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def folder_name(text: str) -> Path:
    """A folder from the command line; the empty text, which is also that of an unset variable, names none."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got an empty text")
    return Path(text)


def at_least(least: int) -> Callable[[str], int]:
    """Type of an option that is a whole number, and no smaller one."""

    def parse(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    parse.__name__ = "whole number"  # which argparse says was expected
    return parse


def positive(text: str) -> float:
    """Type of an option that is a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return number


def seed(text: str) -> int:
    """Type of an option that is a seed."""
    number = int(text)
    if not 0 <= number <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"must be from 0 to {LARGEST_SEED}, got {text}")
    return number


def alone(datamodule: Any, command: str, model: dict[str, Any] | None) -> TokenDataModule:
    """A datamodule that works without a trainer; the tokenizer it does not name is that of the configured model.

    Raises:
        ValueError: If it is none of this package's kind.
    """
    if not isinstance(datamodule, TokenDataModule):
        raise ValueError(f"`longrope {command}` takes a TokenDataModule, got {type(datamodule).__name__}.")
    arguments = model or {}
    module = SimpleNamespace(name_or_path=(arguments.get("init_args") or arguments).get("name_or_path"))
    datamodule.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=module, distributed_sampler_kwargs=None
    )
    return datamodule
