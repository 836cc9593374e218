"""Documents out of files, one at a time: JSON lines (plain, gzip, Zstandard), Parquet and plain text."""

import glob
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import zstandard

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
CHUNK = 1 << 20  # bytes read at a time


class Document(NamedTuple):
    """One document and where it came from."""

    text: str
    source: Path = Path()
    """The file it was in."""
    record: int = 0
    """Line (JSON lines) or row (Parquet) in that file, counted from 1; 1 in a text file."""
    label: str = ""
    """Name of the source it belongs to, such as a subset of the Pile; empty if none is known."""


class _Bad(NamedTuple):
    """A record that cannot be used."""

    why: str
    record: int


SourceOf = Callable[[dict[str, Any], Path], str | None]
"""Name of a record's source, from the record and its file; None where they do not tell it."""


class _Fields(NamedTuple):
    """Where in a record its text and the name of its source are."""

    text: str
    source: str | SourceOf | None

    def of(self, record: dict[str, Any], file: Path, number: int) -> "Document | _Bad":
        """The document of a record."""
        if self.text not in record:
            return _Bad(f"no field {self.text!r}, only {sorted(record)} (`text_field` names the text)", number)
        label = self.label(record, file)
        if label is None:
            return _Bad(f"no source at {self.source!r} in {sorted(record)} (`source_field` names it)", number)
        return _checked(record[self.text], file, self.text, number, label)

    def label(self, record: dict[str, Any], file: Path) -> str | None:
        """Name of the source, None where it should be told and is not."""
        if self.source is None or callable(self.source):
            return self.source(record, file) if self.source else ""
        return field_text(record, self.source)


Reader = Callable[[Path, _Fields], Iterator[Document | _Bad]]
"""Reads a file, given which fields hold what."""


def field_text(record: Any, path: str) -> str | None:
    """The text or number at a dotted path such as ``meta.source``; a text on the way is read as JSON.

    Returns:
        None if there is no such place or it holds neither text nor a number.
    """
    for name in path.split("."):
        if isinstance(record, str):
            try:
                record = json.loads(record)
            except (ValueError, RecursionError):
                return None
        if not isinstance(record, dict):
            return None
        record = record.get(name)
    return str(record) if isinstance(record, str | int | float) else None


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """Files that a list of files, folders and globs stands for, each once, in the given order and sorted within one.

    A folder stands for the files in it and below whose names end like one of ``SUFFIXES``.

    Raises:
        ValueError: If an entry stands for no file, or a file is of no known kind.
    """
    found: dict[Path, None] = {}
    for path in paths:
        files = _expand_one(Path(path).expanduser())
        if not files:
            raise ValueError(f"No file to read at {str(path)!r}: expected a file, a folder or a glob of {_known()}.")
        found.update((file.resolve(), None) for file in files)
    return list(found)


def _expand_one(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and _reader(file))
    files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files = [file for file in files if file.is_file()]
    for file in files:
        if not _reader(file):
            raise ValueError(f"{file} is of no known kind: expected a name that ends in {_known()}.")
    return files


def read_documents(
    files: Iterable[Path],
    text_field: str = "text",
    on_error: OnError = "raise",
    source_field: str | SourceOf | None = None,
) -> Iterator[Document]:
    """The documents of some files in order; empty lines of JSON lines are passed over.

    Args:
        files: Files as ``expand`` gives them.
        text_field: Name of the field that holds the text; text files have none.
        on_error: ``"raise"`` stops at the first record that is malformed, lacks the field or is not UTF-8; ``"skip"``
            passes over such records and logs their number once, at the end.
        source_field: Where a record names its source: a dotted path such as ``meta.pile_set_name``, or a function of
            the record and its file. Text files have no record: a path finds nothing in them.

    Raises:
        ValueError: With the file and the record's number, unless ``on_error`` is ``"skip"``.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'`on_error` must be "raise" or "skip", got {on_error!r}.')
    fields = _Fields(text_field, source_field)
    skipped, first = 0, ""
    for file in files:
        reader = _reader(file)
        assert reader is not None, f"{file} did not come from `expand`"
        for item in reader(file, fields):
            if isinstance(item, Document):
                yield item
                continue
            message = f"{file}, record {item.record}: {item.why}"
            if on_error == "raise":
                raise ValueError(f"{message}. on_error='skip' passes over such records.")
            skipped, first = skipped + 1, first or message
    if skipped:
        log.warning("Skipped %d records that could not be read; the first: %s.", skipped, first)


def _read_lines(chunks: Callable[[Path], Iterator[bytes]]) -> Reader:
    """A reader of JSON lines from what opens and unpacks the file."""

    def read(file: Path, fields: _Fields) -> Iterator[Document | _Bad]:
        number = 0
        try:
            for number, line in enumerate(_lines(chunks(file)), start=1):
                if line.strip():
                    yield _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, file, fields, number)
        except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
            yield _Bad(f"the file is cut off or damaged ({error})", number + 1)

    return read


def _parse(line: bytes, file: Path, fields: _Fields, number: int) -> Document | _Bad:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _Bad(f"not UTF-8 ({error.reason} at byte {error.start} of the line)", number)
    except (ValueError, RecursionError) as error:
        return _Bad(f"not JSON ({error})", number)
    if not isinstance(record, dict):
        return _Bad(f"expected a JSON object, got {type(record).__name__}", number)
    return fields.of(record, file, number)


def _checked(text: Any, file: Path, text_field: str, number: int, label: str) -> Document | _Bad:
    if not isinstance(text, str):
        return _Bad(f"field {text_field!r} is no text but {type(text).__name__}", number)
    try:
        text.encode("utf-8")  # JSON can spell half of a surrogate pair, and no tokenizer can read that
    except UnicodeEncodeError as error:
        return _Bad(f"field {text_field!r} is not UTF-8 ({error.reason})", number)
    return Document(text, file, number, label)


def _read_text(file: Path, fields: _Fields) -> Iterator[Document | _Bad]:
    try:
        yield fields.of({fields.text: file.read_bytes().decode("utf-8-sig")}, file, 1)
    except UnicodeDecodeError as error:
        yield _Bad(f"not UTF-8 ({error.reason} at byte {error.start})", 1)


def _read_parquet(file: Path, fields: _Fields) -> Iterator[Document | _Bad]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        table = parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        if fields.text not in columns:
            yield _Bad(f"no column {fields.text!r}, only {columns} (`text_field` names the text)", 1)
            return
        wanted = None if callable(fields.source) else [fields.text, *str(fields.source or "").split(".")[:1]]
        names = [name for name in columns if wanted is None or name in wanted]
        for batch in table.iter_batches(batch_size=256, columns=names):
            for row in range(len(batch)):
                number += 1
                try:
                    record = {name: column[row].as_py() for name, column in zip(names, batch.columns, strict=True)}
                    yield fields.of(record, file, number)
                except UnicodeDecodeError as error:
                    yield _Bad(f"not UTF-8 ({error.reason})", number)
    except (ArrowException, OSError) as error:
        yield _Bad(f"the file is cut off or damaged ({error})", number + 1)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends; only a line feed ends one, as JSON lines has it."""
    parts: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        if others:
            yield b"".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    yield b"".join(parts)


def _plain(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        yield from iter(lambda: stream.read(CHUNK), b"")


def _gzip(file: Path) -> Iterator[bytes]:
    with gzip.open(file) as stream:
        yield from iter(lambda: stream.read(CHUNK), b"")


def _zstd(file: Path) -> Iterator[bytes]:
    """Unlike ``zstandard.open`` this reads every frame of the file, and a file that is cut off is an error."""
    frame = None
    for chunk in _plain(file):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame is not complete")


SUFFIXES: dict[str, Reader] = {
    ".jsonl": _read_lines(_plain),
    ".jsonl.gz": _read_lines(_gzip),
    ".jsonl.zst": _read_lines(_zstd),
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
"""What a file's name ends in, and the reader for it."""


def _reader(file: Path) -> Reader | None:
    return next((reader for suffix, reader in SUFFIXES.items() if file.name.lower().endswith(suffix)), None)


def _known() -> str:
    return ", ".join(SUFFIXES)
