"""Records to documents: where the text and the name of its source are, and what makes a record a bad one."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
SLICE = 1 << 22  # characters of a text that are checked at a time

REDPAJAMA = ("arxiv", "book", "c4", "common_crawl", "github", "stackexchange", "wikipedia")
ALIASES = {"cc": "common_crawl", "commoncrawl": "common_crawl", "books": "book", "wiki": "wikipedia"}


class Place(NamedTuple):
    """Where a record is; reading goes on after one."""

    source: Path
    record: int


class Document(NamedTuple):
    """One document and where it came from."""

    text: str
    source: Path = Path()
    """The file it was in, or the name of its hub data set."""
    record: int = 0
    """Line (JSON lines) or row (Parquet) in that file, counted from 1; 1 in a text file."""
    label: str = ""
    """Name of the source it belongs to, such as a subset of the Pile; empty if none is known."""


class BadRecord(NamedTuple):
    """A record that gives no document."""

    kind: Literal["malformed", "not_utf8", "missing_field", "wrong_type", "empty", "damaged_file"]
    why: str
    source: Path
    record: int

    def __str__(self) -> str:
        return f"{self.source}, record {self.record}: {self.why}"


TextOf = Callable[[dict[str, Any]], str]
"""Text of a record; a ``ValueError`` says why there is none."""
SourceOf = Callable[[dict[str, Any], Path], str | None]
"""Name of a record's source, from the record and its file; None where they do not tell it."""


@dataclass(frozen=True)
class Fields:
    """Where in a record its text and the name of its source are.

    Attributes:
        text: Name of the field that holds the text, or a function of the record.
        source: Dotted path of the name of the source, such as ``meta.pile_set_name``, or a function of the record and
            its file; None where nobody asks.
    """

    text: str | TextOf = "text"
    source: str | SourceOf | None = None

    @property
    def columns(self) -> list[str] | None:
        """Fields that must be read; None for all."""
        if callable(self.text) or callable(self.source):
            return None
        return [self.text, *([self.source.split(".")[0]] if self.source else [])]

    def document(self, record: Any, file: Path, number: int) -> Document | BadRecord:
        """The document of a record, or what is wrong with it."""
        if not isinstance(record, dict):
            return BadRecord("malformed", f"expected a JSON object, got {type(record).__name__}", file, number)
        text = self._text(record, file, number)
        if isinstance(text, BadRecord):
            return text
        label = self._label(record, file)
        if label is None:
            why = f"no source at {self.source!r} in {sorted(record)} (`source_field` names it)"
            return BadRecord("missing_field", why, file, number)
        return Document(text, file, number, label)

    def _text(self, record: dict[str, Any], file: Path, number: int) -> str | BadRecord:
        if callable(self.text):
            try:
                text, name = self.text(record), "the text"
            except ValueError as error:
                return BadRecord("missing_field", str(error), file, number)
        else:
            name = f"field {self.text!r}"
            if self.text not in record:
                why = f"no {name}, only {sorted(record)} (`text_field` names the text)"
                return BadRecord("missing_field", why, file, number)
            text = record[self.text]
        if not isinstance(text, str):
            return BadRecord("wrong_type", f"{name} is no text but {type(text).__name__}", file, number)
        if not text:
            return BadRecord("empty", f"{name} is empty", file, number)
        try:  # JSON can spell half of a surrogate pair, and no tokenizer can read that
            for start in range(0, 0 if text.isascii() else len(text), SLICE):
                text[start : start + SLICE].encode()
        except UnicodeEncodeError as error:
            return BadRecord("not_utf8", f"{name} is not UTF-8 ({error.reason})", file, number)
        return text

    def _label(self, record: dict[str, Any], file: Path) -> str | None:
        if self.source is None or callable(self.source):
            return self.source(record, file) if self.source else ""
        return field_text(record, self.source)


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


def redpajama_source(record: dict[str, Any], file: Path) -> str | None:
    """The part of RedPajama v1 that a record is from, one of ``REDPAJAMA``; None if nothing tells it.

    The published files tell it in six ways: ``red_pajama_subset``, ``source``, ``meta.source``, SlimPajama's
    ``meta.redpajama_set_name`` (``RedPajamaC4``), the same inside a ``meta`` that is JSON text, or only by the name of
    the file or of a folder it is in (``arxiv/arxiv_0.jsonl``, ``book.jsonl``, ``cc_2019-30_sample.jsonl``).

    Args:
        record: The record.
        file: Its file. Every folder in this path may tell: give the path below the corpus.
    """
    for path in ("red_pajama_subset", "meta.red_pajama_subset", "meta.redpajama_set_name", "meta.source", "source"):
        if (name := _redpajama_name(field_text(record, path) or "")) is not None:
            return name
    return next(filter(None, map(_redpajama_name, (file.name, *reversed(file.parts[:-1])))), None)


def _redpajama_name(text: str) -> str | None:
    """The part that a name such as ``cc/2019-30/en_middle_0053`` or ``arxiv_sample.jsonl`` begins with."""
    text = text.lower().removeprefix("redpajama")
    names = {**{name: name for name in REDPAJAMA}, **ALIASES}
    for name in sorted(names, key=len, reverse=True):
        if text.startswith(name) and not text[len(name) : len(name) + 1].isalnum():
            return names[name]
    return None


@dataclass
class Skipped:
    """How many records of each kind were passed over, and the first of each."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, record: BadRecord) -> None:
        """Counts one more."""
        self.counts[record.kind] = self.counts.get(record.kind, 0) + 1
        self.first.setdefault(record.kind, str(record))

    def log(self) -> None:
        """One warning with all counts, if there are any."""
        if self.counts:
            counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
            firsts = "; ".join(self.first.values())
            log.warning("Skipped %d records (%s); the first: %s.", sum(self.counts.values()), counts, firsts)


class Reading(ABC, Iterable[Document]):
    """Documents that can be read again from any of them on.

    Iterating gives the documents, and ends with one warning that counts the records that were skipped.

    Args:
        on_error: ``"raise"`` stops at the first record that gives no document; ``"skip"`` passes over such records.
        only: Names of the sources to keep; None keeps all. The documents of others are no bad records.

    Raises:
        ValueError: If ``on_error`` is neither; while reading, with the file and the record's number.
    """

    unit = "B"
    """What ``progress`` counts."""

    def __init__(self, on_error: OnError, only: Iterable[str] | None = None) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f'`on_error` must be "raise" or "skip", got {on_error!r}.')
        self.on_error = on_error
        self.only = None if only is None else frozenset(only)

    @abstractmethod
    def progress(self) -> tuple[float, float | None]:
        """How far reading has come and how far it will, in any unit; None if nobody knows."""

    @abstractmethod
    def _items(self, after: Place | None) -> Iterator[Document | BadRecord]:
        """All records in order, those up to ``after`` left out."""

    def items(self, after: Place | None = None) -> Iterator[Document | BadRecord]:
        """Documents and the records that are skipped, in the order of the records.

        Args:
            after: Begin behind this record, which was read before.
        """
        for item in self._items(after):
            if isinstance(item, BadRecord):
                if self.on_error == "raise":
                    raise ValueError(f"{item}. on_error='skip' passes over such records.")
                yield item
            elif self.only is None or item.label in self.only:
                yield item

    def __iter__(self) -> Iterator[Document]:
        skipped = Skipped()
        for item in self.items():
            if isinstance(item, Document):
                yield item
            else:
                skipped.add(item)
        skipped.log()
