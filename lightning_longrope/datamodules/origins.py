"""What a token store's text comes from, in words that are the same in every process: they are hashed into its name."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_longrope.datamodules.base import digest
from lightning_longrope.datamodules.readers import newest_revision
from lightning_longrope.files import write_json
from lightning_longrope.reading import read_json_object

log = logging.getLogger(__name__)

State = tuple[str, int, int]
"""Path of a file, its bytes, and when it was last written, in nanoseconds."""


def file_states(files: Iterable[Path]) -> list[State]:
    """The files as they are now."""
    return [(str(file), (now := file.stat()).st_size, now.st_mtime_ns) for file in files]


def folder_states(path: Path) -> list[State]:
    """The files in a folder and below, or a file alone; what is hidden is left out, as ``datasets`` does."""
    path = path.resolve()
    below = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return file_states(file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts))


def lasting_name(what: Any) -> str:
    """Name of a field, or of what stands for one, that is the same in every process.

    Raises:
        ValueError: If it has none: with an address in memory in it, every process would tokenise anew.
    """
    if hasattr(what, "__qualname__"):
        return f"{what.__module__}.{what.__qualname__}"
    if re.search(r" at 0x[0-9a-fA-F]+", repr(what)):
        raise ValueError(
            f"`source_of` and `text_of` must give a field, a function or an object with a `repr` of its own, got"
            f" {what!r}: make {type(what).__name__} a frozen dataclass."
        )
    return repr(what)


@dataclass
class Revisions:
    """Commits of hub data sets, noted beside the tokens so that all processes of a run take the same.

    Attributes:
        folder: Where they are noted.
    """

    folder: Path
    _unknown: set[str] = field(default_factory=set)

    def ask(self, name: str) -> None:
        """Asks the hub and notes what it says; what was noted stays where it says nothing."""
        note, newest = self._note(name), newest_revision(name)
        if newest is not None:
            write_json(note, {"data_set": name, "revision": newest})
        elif not note.is_file() and name not in self._unknown:
            self._unknown.add(name)
            log.warning(
                "The hub does not say at which commit %s is: tokens of an earlier one in %s would be used as they are.",
                *(name, self.folder),
            )

    def of(self, name: str) -> str | None:
        """The commit that was noted last; the hub is asked where there is none. None if it does not say."""
        note = self._note(name)
        if not note.is_file() and name not in self._unknown:
            self.ask(name)
        return str(read_json_object(note).get("revision")) if note.is_file() else None

    def _note(self, name: str) -> Path:
        return self.folder / f".revision-{digest(name)}.json"
