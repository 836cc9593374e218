"""Documents out of files: JSON lines and JSON (plain, gzip, Zstandard), Parquet and plain text."""

import glob
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import zstandard
from typing_extensions import override

from lightning_longrope.datamodules.readers.records import (
    BadRecord,
    Document,
    Fields,
    OnError,
    Place,
    Reading,
    SourceOf,
    TextOf,
)

CHUNK = 1 << 20  # bytes read at a time
PACKED = {".gz": 1 << 16, ".zst": 1 << 12}  # the same of packed files, which grow at most 1,030 and 32,768 times
LONGEST = 1 << 31  # bytes of a record; a few megabytes of zeros, packed, would fill any memory
ROWS = 32  # rows of a Parquet file read at a time


@dataclass
class Meter:
    """Bytes of the open file that have been read."""

    bytes: int = 0


Item = Document | BadRecord
Chunks = Callable[[Path, Meter], Iterator[bytes]]
Reader = Callable[[Path, Fields, Meter], Iterator[Item]]
"""Reads a file, given which fields hold what."""


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """Files that a list of files, folders and globs stands for, each once, in the given order and sorted within one.

    Files keep the names they were found by, links included (those in the caches of Hugging Face are links to files
    without an ending). Two links to one file are one file.

    A folder stands for the files in it and below whose names end like one of ``SUFFIXES``, but for plain ``.json``
    files, which beside data often are settings: name them, or use a glob.

    Raises:
        ValueError: If an entry stands for no file, or a file is of no known kind.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        files = _expand_one(Path(path).expanduser())
        if not files:
            raise ValueError(f"No file to read at {str(path)!r}: expected a file, a folder or a glob of {_known()}.")
        for file in files:
            found.setdefault(file.resolve(), located(file))
    return list(found.values())


def located(path: Path) -> Path:
    """The path from the root, links in it kept: a link may say what a file is where its target does not."""
    path = path.absolute()
    return path.parent.resolve() / path.name if ".." in path.parts else path


def _expand_one(path: Path) -> list[Path]:
    if path.is_dir():
        below = (file for file in path.rglob("*") if file.is_file() and _reader(file))
        return sorted(file for file in below if file.suffix.lower() != ".json")
    files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files = [file for file in files if file.is_file()]
    for file in files:
        if not _reader(file):
            raise ValueError(f"{file} is of no known kind: expected a name that ends in {_known()}.")
    return files


def read_documents(
    files: Iterable[Path],
    text_field: str | TextOf = "text",
    on_error: OnError = "raise",
    source_field: str | SourceOf | None = None,
    only: Iterable[str] | None = None,
) -> "FileReading":
    """The documents of some files in order; empty lines of JSON lines are passed over.

    Args:
        files: Files as ``expand`` gives them.
        text_field: Name of the field that holds the text, or a function of the record; text files have neither.
        on_error: ``"raise"`` stops at the first record that is malformed, lacks a field, is empty or is not UTF-8, and
            at a file that is damaged; ``"skip"`` passes over these and counts them.
        source_field: Where a record names its source: a dotted path such as ``meta.pile_set_name``, or a function of
            the record and its file. Text files have no record: a path finds nothing in them.
        only: Names of the sources to keep; None keeps all.

    Raises:
        ValueError: If ``on_error`` is neither; while reading, with the file and the record's number.
    """
    return FileReading(list(files), Fields(text_field, source_field), on_error, only)


class FileReading(Reading):
    """What ``read_documents`` gives: documents of files. Files that were done are not opened to go on after them."""

    def __init__(
        self, files: list[Path], fields: Fields, on_error: OnError = "raise", only: Iterable[str] | None = None
    ) -> None:
        super().__init__(on_error, only)
        self.files = files
        self.fields = fields
        self._done = 0
        self._total: int | None = None
        self._meter = Meter()

    @override
    def progress(self) -> tuple[float, float]:
        """Bytes of the files, packed as they are; of all of them as they were when they were first asked for."""
        if self._total is None:
            self._total = sum(file.stat().st_size for file in self.files)
        return self._done + self._meter.bytes, self._total

    @override
    def _items(self, after: Place | None) -> Iterator[Item]:
        first, done = (0, 0) if after is None else (self.files.index(after.source), after.record)
        sizes = [file.stat().st_size for file in self.files]
        self._done, self._total = sum(sizes[:first]), sum(sizes)
        for file, size in zip(self.files[first:], sizes[first:], strict=True):
            reader = _reader(file)
            assert reader is not None, f"{file} did not come from `expand`"
            self._meter = Meter()
            for item in reader(file, self.fields, self._meter):
                if item.record > done:
                    yield item
            done, self._meter = 0, Meter()
            self._done += size


def _read_lines(chunks: Chunks) -> Reader:
    """A reader of JSON lines from what opens and unpacks the file."""

    def read(file: Path, fields: Fields, meter: Meter) -> Iterator[Item]:
        return _guarded(_lines(chunks(file, meter)), file, fields)

    return read


def _read_json(chunks: Chunks) -> Reader:
    """A reader of JSON lines, or of one JSON list of records."""

    def read(file: Path, fields: Fields, meter: Meter) -> Iterator[Item]:
        unpacked = chunks(file, meter)
        first = b""
        try:
            while not first.removeprefix(b"\xef\xbb\xbf").strip() and (chunk := next(unpacked, None)) is not None:
                first += chunk  # packed files begin with chunks of nothing
        except DAMAGE as error:
            yield _damaged(file, 1, error)
            return
        stream = chain([first], unpacked)
        if not first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _guarded(_lines(stream), file, fields)
            return
        try:
            records = _parse(_joined(stream).removeprefix(b"\xef\xbb\xbf"), file, 1)
        except DAMAGE as error:
            records = _damaged(file, 1, error)
        if isinstance(records, BadRecord):
            yield records
        else:
            yield from (fields.document(record, file, number) for number, record in enumerate(records, start=1))

    return read


DAMAGE = (EOFError, OSError, zlib.error, zstandard.ZstdError)


def _guarded(lines: Iterator[bytes], file: Path, fields: Fields) -> Iterator[Item]:
    number = 0
    try:
        for line in lines:  # counted by hand: `enumerate` would keep a second reference to a long line
            number += 1
            if line.strip():
                record = _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, file, number)
                del line
                yield record if isinstance(record, BadRecord) else fields.document(record, file, number)
    except DAMAGE as error:
        yield _damaged(file, number + 1, error)


def _parse(line: bytes, file: Path, number: int) -> Any:
    """What the JSON says, or the bad record it is."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord("not_utf8", f"not UTF-8 ({error.reason} at byte {error.start} of the line)", file, number)
    except (ValueError, RecursionError) as error:
        return BadRecord("malformed", f"not JSON ({error})", file, number)


def _damaged(file: Path, number: int, error: Exception, lost: str = "") -> BadRecord:
    return BadRecord("damaged_file", f"the file is cut off or damaged ({error}){lost}", file, number)


def _read_text(chunks: Chunks) -> Reader:
    """A reader of files that are one document."""

    def read(file: Path, fields: Fields, meter: Meter) -> Iterator[Item]:
        fields = Fields("text" if callable(fields.text) else fields.text, fields.source)
        try:
            yield fields.document({fields.text: _joined(chunks(file, meter)).decode("utf-8-sig")}, file, 1)
        except UnicodeDecodeError as error:
            yield BadRecord("not_utf8", f"not UTF-8 ({error.reason} at byte {error.start})", file, 1)
        except DAMAGE as error:
            yield _damaged(file, 1, error)

    return read


def _read_parquet(file: Path, fields: Fields, meter: Meter) -> Iterator[Item]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
    except (ArrowException, OSError) as error:
        yield _damaged(file, 1, error)
        return
    columns = table.schema_arrow.names
    if not callable(fields.text) and fields.text not in columns:
        why = f"no column {fields.text!r}, only {columns} (`text_field` names the text)"
        yield BadRecord("missing_field", why, file, 1)
        return
    names = [name for name in columns if fields.columns is None or name in fields.columns]
    rows, size, number = table.metadata.num_rows, file.stat().st_size, 0
    for group in range(table.num_row_groups):
        end = number + table.metadata.row_group(group).num_rows
        try:
            for item in _read_group(table, group, names, file, fields, number):
                number = item.record
                meter.bytes = size * number // rows
                yield item
        except (ArrowException, OSError) as error:
            yield _damaged(file, number + 1, error, f"; {end - number} of {rows} rows are lost")
        number = end


def _read_group(table: Any, group: int, names: list[str], file: Path, fields: Fields, number: int) -> Iterator[Item]:
    """The rows of one row group, which can be read where another is damaged."""
    for batch in table.iter_batches(batch_size=ROWS, row_groups=[group], columns=names):
        for row in range(len(batch)):
            number += 1
            try:
                record = {name: column[row].as_py() for name, column in zip(names, batch.columns, strict=True)}
                yield fields.document(record, file, number)
            except UnicodeDecodeError as error:
                yield BadRecord("not_utf8", f"not UTF-8 ({error.reason})", file, number)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends; only a line feed ends one, as JSON lines has it."""
    parts: list[bytes] = []
    for chunk in _limited(chunks):
        first, *others = chunk.split(b"\n")
        parts.append(first)
        if others:
            yield _taken(parts)
            yield from others[:-1]
            parts = [others[-1]]
    yield _taken(parts)


def _limited(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks, if there are line ends in them now and then."""
    size = 0
    for chunk in chunks:
        size = len(chunk) - chunk.rfind(b"\n") - 1 if b"\n" in chunk else size + len(chunk)
        if size > LONGEST:
            raise EOFError(f"a record has more than {LONGEST} bytes")
        yield chunk


def _joined(chunks: Iterable[bytes]) -> bytes:
    """All of a file that is one record."""
    parts, size = [], 0
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > LONGEST:
            raise EOFError(f"it has more than {LONGEST} bytes: only JSON lines may be so long")
    return b"".join(parts)


def _taken(parts: list[bytes]) -> bytes:
    """The parts joined; the list is emptied, so that a long line is not there twice."""
    line = b"".join(parts)
    parts.clear()
    return line


def _plain(file: Path, meter: Meter, size: int = CHUNK) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(size):
            meter.bytes += len(chunk)
            yield chunk


def _gzip(file: Path, meter: Meter) -> Iterator[bytes]:
    """Unlike ``gzip.open`` this gives all there is of a file that is cut off, before it is an error."""
    member, begun = None, False
    for chunk in _plain(file, meter, PACKED[".gz"]):
        if begun and member is None:
            chunk = chunk.lstrip(b"\0")  # padding behind the last member may be long
        while chunk:
            begun = True
            member = member or zlib.decompressobj(wbits=31)
            yield member.decompress(chunk)
            chunk = member.unused_data.lstrip(b"\0") if member.eof else b""
            member = None if member.eof else member
    if member is not None or not begun:
        raise EOFError("it ends before its end mark" if begun else "it is empty")


def _zstd(file: Path, meter: Meter) -> Iterator[bytes]:
    """Unlike ``zstandard.open`` this reads every frame of the file, and a file that is cut off is an error."""
    frame, begun = None, False
    for chunk in _plain(file, meter, PACKED[".zst"]):
        while chunk:
            begun = True
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None or not begun:
        raise EOFError("the last frame is not complete" if begun else "it is empty")


_UNPACK: dict[str, Chunks] = {"": _plain, ".gz": _gzip, ".zst": _zstd}
_KINDS: dict[str, Callable[[Chunks], Reader]] = {".jsonl": _read_lines, ".json": _read_json, ".txt": _read_text}
SUFFIXES: dict[str, Reader] = {
    **{kind + packed: read(chunks) for kind, read in _KINDS.items() for packed, chunks in _UNPACK.items()},
    ".parquet": _read_parquet,
}
"""What a file's name ends in, and the reader for it."""


def _reader(file: Path) -> Reader | None:
    return next((reader for suffix, reader in SUFFIXES.items() if file.name.lower().endswith(suffix)), None)


def _known() -> str:
    return ", ".join(SUFFIXES)
