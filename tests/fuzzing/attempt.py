"""One damaged file before one reader, and what became of it."""

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzing.reader import Reader
from lightning_longrope.commands import _line

LONGEST = 2000
"""Characters of an error that are still a line."""


@dataclass
class Attempts:
    """A reader at work in a folder of its own."""

    reader: Reader
    folder: Path

    def __post_init__(self) -> None:
        self.path = self.folder / self.reader.file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.reader.prepare(self.folder)
        self.seeds = self.reader.seeds()
        self.intact = [self._read(data) for data in self.seeds]

    def _read(self, data: bytes) -> Any:
        self.path.write_bytes(data)
        return self.reader.read(self.path)

    def problem(self, data: bytes) -> tuple[bool, str | None]:
        """Whether the file was refused, and what is wrong with how it was read or refused; None if nothing is."""
        try:
            value = self._read(data)
        except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
            return True, self._unclear(error)
        except TimeoutError:
            raise
        except BaseException as error:  # a user would see a traceback
            return True, _short(error)
        try:
            self.reader.judge(data, value, self.intact)
        except Exception as error:
            return False, f"read as something else: {_short(error)}"
        return False, None

    def _unclear(self, error: Exception) -> str | None:
        line = _line(error)
        names = (self.path.name, *self.reader.names)
        if not any(name in line for name in names):
            return f"names no file: {line[:300]}"
        return f"a line of {len(line)} characters: {line[:300]}" if len(line) > LONGEST else None


def _short(error: BaseException) -> str:
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-3:]]
    return f"{type(error).__name__}: {str(error)[:300]} ({' '.join(places)})"
