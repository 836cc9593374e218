"""Files that are either whole or not there."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_LITTLE = 1 << 20  # bytes; with less on a disk, it is what made torch fail


def write_whole(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file so that a crash or a full disk leaves the old one or the new one, never a part.

    One process at a time writes a file; what a process that was killed has left beside it is written over.

    Args:
        path: File to write; its folder is made where it is missing.
        write: Writes the content into an open file.

    Raises:
        OSError: Naming ``path``; the old file is still there then.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file with ``write_whole``."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON with ``write_text``; NaN becomes null only if the caller makes it so."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Lets errors of the system name ``path`` where they name no file, also those that torch and safetensors hide."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except RuntimeError as error:
        if (
            isinstance(error.__context__, OSError) and error.__context__.errno is not None
        ):  # of a file that Python writes
            hidden = error.__context__.errno
        elif "inline_container" in str(error):  # torch writes it
            hidden = errno.ENOSPC if shutil.disk_usage(_existing(Path(path))).free < _LITTLE else errno.EIO
        else:
            raise
        raise OSError(hidden, os.strerror(hidden), str(path)) from error


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists())
