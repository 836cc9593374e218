"""The memory of a search on disk: every evaluation, one JSON line each, that survives a cut at any byte.

A line ends in a checksum of what stands before it, so a half-written last line is told from a damaged one:
the first is what a crash leaves and is cut off, the second is an error. The first line names the run
(model, tokenizer, corpus, space, algorithm), so scores of one run are never taken for those of another.

    {"fingerprint": {"seed": 0, ...}, "crc": "5f6a21b4"}
    {"evaluation": 0, "generation": 0, "origin": "seed:linear", "values": [...], ..., "crc": "03c9e11d"}
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_longrope.files import naming
from lightning_longrope.reading import blaming
from lightning_longrope.search.space import Candidate

_TAIL = len(', "crc": "00000000"}')


def strict_json(value: Any) -> Any:
    """``value`` as strict JSON holds it: tuples as lists, NaN and infinities as null, mapping keys as text."""
    if isinstance(value, Mapping):
        return {str(key): strict_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_fingerprint(expected: Mapping[str, Any], got: Mapping[str, Any], source: str) -> None:
    """Refuses to continue a search under other settings.

    Raises:
        ValueError: Naming the first key of ``expected`` that differs, nested keys joined by dots.
    """
    ours, theirs = _flat(strict_json(expected)), _flat(strict_json(got))
    for key in dict.fromkeys([*ours, *theirs]):
        old, new = ours.get(key, "nothing"), theirs.get(key, "nothing")
        if old != new:
            raise ValueError(
                f"{source} belongs to another search: `{key}` differs, expected {old!r}, got {new!r}."
                " Restore the setting, or start a new folder."
            )


class Journal:
    """Evaluations of a search in an append-only file; opening it again continues it.

    Does not lock: one process writes (rank zero), and the others are told what it read.

    Args:
        path: File to continue or, with its folder, to create.
        fingerprint: What must be equal for the scores to be comparable; JSON values, nested mappings allowed.

    Raises:
        ValueError: If the file was written under another fingerprint, or a line is damaged.
    """

    def __init__(self, path: str | Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        lines, size = _read_lines(self.path)
        os.truncate(self.path, size)
        if lines:
            check_fingerprint(_header(self.path, lines[0]), fingerprint, f"`{self.path}`")
        else:
            self._write([{"fingerprint": strict_json(fingerprint)}])
        self.records: list[dict[str, Any]] = lines[1:]
        with blaming(f"`{path}` holds a line that is no evaluation"):
            self._by_candidate = {_key(record): record for record in self.records}

    def __len__(self) -> int:
        return len(self.records)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds evaluations; when it returns they are on the disk.

        Args:
            records: Each with ``values``, ``start_tokens``, ``attention_factor`` and ``score``, and whatever else.
        """
        plain = [strict_json(record) for record in records]
        keys = [_key(record) for record in plain]
        self._write(plain)
        self.records.extend(plain)
        self._by_candidate.update(zip(keys, plain, strict=True))

    def cached(self, candidate: Candidate) -> dict[str, Any] | None:
        """The record of this very candidate, or None; its score is None where it was not finite."""
        return self._by_candidate.get((candidate.values, candidate.start_tokens, candidate.attention_factor))

    def find(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """The last record of the same candidate, or None."""
        return self._by_candidate.get(_key(record))

    def _write(self, records: list[dict[str, Any]]) -> None:
        text = "".join(_line(record) for record in records)
        with naming(self.path), self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def read_journal(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Fingerprint and evaluations of a journal, for reports. Does not change the file.

    Raises:
        ValueError: If a line is damaged, or the file holds no complete first line.
    """
    lines, _ = _read_lines(Path(path))
    if not lines:
        raise ValueError(f"`{path}` holds no search: its first line is missing or was cut off.")
    return _header(path, lines[0]), lines[1:]


def _line(record: dict[str, Any]) -> str:
    body = json.dumps(record, allow_nan=False)[:-1]
    return f'{body}, "crc": "{zlib.crc32(body.encode()):08x}"}}\n'


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Records of all complete lines, and the number of bytes they take; a last line without its end is left out."""
    data = path.read_bytes()
    size = data.rfind(b"\n") + 1
    lines = data[:size].split(b"\n")[:-1]
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)], size


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    body, tail = line[:-_TAIL], line[-_TAIL:]
    if tail != f', "crc": "{zlib.crc32(body):08x}"}}'.encode():
        raise ValueError(
            f"`{path}` line {number} is damaged: its checksum does not match."
            " Cut the file before that line to search on from there, or start a new folder."
        )
    with blaming(f"`{path}` line {number} is no line of a search"):
        return dict(json.loads(body + b"}"))


def _header(path: str | Path, first: dict[str, Any]) -> dict[str, Any]:
    if "fingerprint" not in first:
        raise ValueError(f"`{path}` line 1 must hold the fingerprint of the search, got the keys {sorted(first)}.")
    with blaming(f"`{path}` line 1 does not hold the fingerprint of a search"):
        return dict(first["fingerprint"])


def _key(record: Mapping[str, Any]) -> tuple[tuple[float, ...], int, float]:
    return tuple(record["values"]), record["start_tokens"], record["attention_factor"]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat.update(_flat(entry, f"{prefix}{key}.") if isinstance(entry, dict) else {f"{prefix}{key}": entry})
    return flat
