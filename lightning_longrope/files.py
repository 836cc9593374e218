"""Files that are either whole or not there."""

import errno
import json
import os
import re
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
    except Exception as error:
        if (number := _hidden(error, Path(path))) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _hidden(error: Exception, path: Path) -> int | None:
    """Number of the system's error behind one of torch or safetensors; None if there is none."""
    cause = error.__context__
    if isinstance(error, RuntimeError) and isinstance(cause, OSError) and cause.errno is not None:
        return cause.errno  # torch has written into a file of Python
    if "inline_container" in str(error):  # torch has written by itself, and does not say what went wrong
        return errno.ENOSPC if shutil.disk_usage(_existing(path)).free < _LITTLE else errno.EIO
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists())
