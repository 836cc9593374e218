"""A reader and what it is fed.

A reader either refuses a file, with a ``ValueError`` or ``OSError`` that names it, or gives a value that ``judge``
allows: the one that was written where a checksum covers it, else what another program reads in the same bytes.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: What it reads.
        file: The file that is damaged, in a folder that ``prepare`` fills.
        seeds: Whole files.
        read: Reads the folder's file.
        judge: Of the bytes, what was read, and what was read of each seed; an ``AssertionError`` is a wrong number.
        prepare: Makes what lies beside the file.
        slow: Milliseconds that one input takes, roughly; for the quick tests to choose.
    """

    name: str
    file: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], Any]
    judge: Callable[[bytes, Any, list[Any]], None] = lambda data, value, intact: None
    prepare: Callable[[Path], None] = lambda folder: None
    slow: int = 1
    names: tuple[str, ...] = field(default=())
    """What an error may name in place of the file."""


def unchanged(data: bytes, value: Any, intact: list[Any]) -> None:
    """What checksums cover is read as it was written, or refused."""
    assert any(equal(value, known) for known in intact), f"read {value!r}"


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    return bool(left == right)


def saved(save: Callable[[Path], None]) -> bytes:
    """The bytes of a file that ``save`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "x")
        return (Path(folder) / "x").read_bytes()
