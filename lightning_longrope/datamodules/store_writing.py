"""Documents to a token store that may be cut off at any moment and goes on where it was.

Everything is appended to flat files in the order of the documents, whatever the number of processes. Every few seconds,
between two documents, the files are forced to disk and then ``progress.json`` is replaced: how long each file is, its
checksums, and the place in the corpus. A run that goes on cuts the files back to those lengths and reads on behind that
place, so that no document is lost or doubled. The folder gets its name when all is done::

    .pile-7c1f.partial/   tokens.bin documents.bin sources.bin skipped.jsonl progress.json
    pile-7c1f/            tokens.bin documents.bin sources.bin skipped.jsonl manifest.json
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_longrope.datamodules.hashing import Hasher
from lightning_longrope.datamodules.readers import BadRecord, Document, Place, Reading, Skipped
from lightning_longrope.files import naming, write_json
from lightning_longrope.locks import hold
from lightning_longrope.reading import read_json_object
from lightning_longrope.tokenizing import PIECE, TEXTS, Encoder, Piece, encode_in_order

log = logging.getLogger(__name__)

FORMAT = 4
FILES = ("tokens.bin", "documents.bin", "sources.bin", "hashes.bin", "skipped.jsonl")
BLOCK = 1 << 26  # bytes under one checksum
COMMIT = 10.0  # seconds between two states that a run can go on from
LITTLE = 1 << 25  # bytes of files, packed as they are
MOST_SOURCES = 1 << 16


class Part(NamedTuple):
    """What a batch of texts became."""

    tokens: NDArray[Any]
    lengths: list[int]
    """Tokens of each document that ends in this part, those in earlier parts included."""
    labels: list[str]
    """Source of each of these documents."""
    text_bytes: int
    cuts: int
    skipped: list[BadRecord]
    place: Place | None
    """The last record that is done; None inside a document."""


@dataclass
class _Batch:
    pieces: list[Piece] = field(default_factory=list)
    ends: list[str | None] = field(default_factory=list)  # of each piece: source of the document it ends
    skipped: list[BadRecord] = field(default_factory=list)
    place: Place | None = None
    characters: int = 0

    def add(self, piece: Piece, end: str | None) -> None:
        self.pieces.append(piece)
        self.ends.append(end)
        self.characters += len(piece.text)

    def full(self, limit: int) -> bool:
        return self.characters >= limit or len(self.pieces) + len(self.skipped) >= TEXTS


def parts(
    documents: Iterable[Document | str], encoder: Encoder, workers: int = 0, after: Place | None = None
) -> Iterator[Part]:
    """Tokens of documents in their order, in parts whose bounds do not matter.

    Args:
        documents: A ``Reading``, whose bad records are reported too, or anything else that gives documents or texts.
        encoder: Makes tokens of text.
        workers: Processes; 0 works in this one.
        after: Begin behind this record; of an iterable that is no ``Reading``, so many documents are passed over.
    """
    waiting: deque[_Batch] = deque()

    def pieces() -> Iterator[list[Piece]]:
        for batch in _batches(_placed(documents, after), encoder, PIECE if workers else 8 * PIECE):
            waiting.append(batch)
            yield batch.pieces

    begun = 0  # tokens of the document that has not ended
    for tokens, counts in encode_in_order(encoder, pieces(), workers):
        batch, lengths = waiting.popleft(), []
        for count, end in zip(counts, batch.ends, strict=True):
            begun += count
            if end is not None:
                lengths.append(begun)
                begun = 0
        labels = [end for end in batch.ends if end is not None]
        size = sum(len(piece.text.encode()) for piece in batch.pieces)
        cuts = sum(piece.cut for piece in batch.pieces)
        yield Part(tokens, lengths, labels, size, cuts, batch.skipped, batch.place)


def _placed(
    documents: Iterable[Document | str], after: Place | None
) -> Iterator[tuple[Document | BadRecord, Place | None]]:
    if isinstance(documents, Reading):
        yield from ((item, Place(item.source, item.record)) for item in documents.items(after))
        return
    first = after.record if after is not None else 0
    for number, item in enumerate(islice(documents, first, None), start=first + 1):
        yield Document(item) if isinstance(item, str) else item, Place(Path(), number)


def _batches(
    items: Iterator[tuple[Document | BadRecord, Place | None]], encoder: Encoder, limit: int
) -> Iterator[_Batch]:
    batch = _Batch()
    for item, place in items:
        if isinstance(item, BadRecord):
            batch.skipped.append(item)
        else:
            left, label = len(item.text), item.label
            for piece in encoder.pieces(item.text):
                left -= len(piece.text)
                batch.add(piece, None if left else label)
                if left and batch.full(limit):
                    batch.place = None
                    yield batch
                    batch = _Batch()
        batch.place = place
        if batch.full(limit):
            yield batch
            batch = _Batch()
    if batch.pieces or batch.skipped:
        yield batch


@dataclass
class Tally:
    """Counts over all parts so far."""

    documents: int = 0
    tokens: int = 0
    ended: int = 0  # tokens of the documents that have ended
    largest_token: int = -1
    text_bytes: int = 0
    uncertain_cuts: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=Skipped)

    def add(self, part: Part) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        """Counts a part; where each of its documents ends and its place in ``sources``, both [documents]."""
        self.documents += len(part.lengths)
        self.tokens += len(part.tokens)
        self.largest_token = max(self.largest_token, int(part.tokens.max(initial=0)) if len(part.tokens) else -1)
        self.text_bytes += part.text_bytes
        self.uncertain_cuts += part.cuts
        for record in part.skipped:
            self.skipped.add(record)
        numbers = [self.sources.setdefault(label, len(self.sources)) for label in part.labels]
        if len(self.sources) > MOST_SOURCES:
            raise ValueError(
                f"The documents name more than {MOST_SOURCES} sources, one of them {part.labels[-1]!r}: `source_field`"
                " must name a field with the same value in many documents."
            )
        ends = self.ended + np.cumsum(part.lengths, dtype=np.int64)
        self.ended += sum(part.lengths)
        return ends, np.array(numbers, np.uint16)

    def manifest(self, encoder: Encoder, tokenizer: Any, corpus: str | None = None) -> dict[str, Any]:
        """What a manifest says of the tokens and of what made them."""
        return {
            "format": FORMAT,
            "corpus": corpus,
            "tokenizer": encoder.fingerprint,
            "tokenizer_name": str(getattr(tokenizer, "name_or_path", "")),
            "vocabulary": encoder.vocabulary,
            "dtype": encoder.dtype.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "largest_token": self.largest_token,
            "text_bytes": self.text_bytes,
            "uncertain_cuts": self.uncertain_cuts,
            "source_names": list(self.sources),
            "skipped": dict(sorted(self.skipped.counts.items())),
        }


class Growing:
    """A file that only grows, with a checksum for every block of it.

    Args:
        path: The file.
        state: What ``state`` said; whatever was written later is cut off.

    Raises:
        ValueError: If the file is shorter than it was.
    """

    def __init__(self, path: Path, state: dict[str, Any] | None = None) -> None:
        self.bytes: int = 0 if state is None else state["bytes"]
        self.blocks: list[int] = [] if state is None else list(state["blocks"])
        self.path, self._file = path, path.open("ab")
        if self._file.tell() < self.bytes:
            raise ValueError(f"{path} is shorter than `progress.json` says: delete {path.parent} to begin anew.")
        self._file.truncate(self.bytes)

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes."""
        with naming(self.path):
            self._file.write(data)
        for start, end in _blocks(self.bytes, self.bytes + len(data)):
            piece = data[start - self.bytes : end - self.bytes]
            if start % BLOCK:
                self.blocks[-1] = zlib.crc32(piece, self.blocks[-1])
            else:
                self.blocks.append(zlib.crc32(piece))
        self.bytes += len(data)

    def sync(self) -> None:
        """Forces everything to disk."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        with naming(self.path):
            self._file.close()

    @property
    def state(self) -> dict[str, Any]:
        """Length and checksums."""
        return {"bytes": self.bytes, "blocks": list(self.blocks)}


def _blocks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """A range of a file cut where its blocks end."""
    while first < last:
        end = min(last, (first // BLOCK + 1) * BLOCK)
        yield first, end
        first = end


class StoreWriter:
    """Writes the files of a store into a folder, or goes on writing them.

    Args:
        folder: Where the files are; made where it is missing.
        identity: All that the content depends on; files of another identity are removed.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        saved = _read_progress(folder / "progress.json", identity)
        if saved is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.tally, self.place = Tally(), None
        if saved is not None:
            self.tally = Tally(**{**saved["tally"], "skipped": Skipped(**saved["tally"]["skipped"])})
            self.place = Place(Path(saved["place"][0]), saved["place"][1])
        states = saved["files"] if saved is not None else {}
        self.files = {name: Growing(folder / name, states.get(name)) for name in FILES}
        if saved is None:
            self.files["documents.bin"].write(np.zeros(1, np.int64).tobytes())
        self._committed = time.monotonic()
        self._hasher = Hasher()

    def add(self, part: Part) -> None:
        """Appends a part, and makes a state to go on from where it is time."""
        ends, sources = self.tally.add(part)
        self.files["tokens.bin"].write(part.tokens.data.cast("B") if len(part.tokens) else b"")
        self.files["documents.bin"].write(ends.tobytes())
        self.files["sources.bin"].write(sources.tobytes())
        self.files["hashes.bin"].write(self._hasher.add(part.tokens, part.lengths).tobytes())
        for record in part.skipped:
            line = {"kind": record.kind, "file": str(record.source), "record": record.record, "why": record.why}
            self.files["skipped.jsonl"].write((json.dumps(line) + "\n").encode())
        if part.place is not None:
            self.place = part.place
            if time.monotonic() - self._committed >= COMMIT:
                self.commit()

    def commit(self) -> None:
        """Makes what was written a state to go on from; between two documents only."""
        for file in self.files.values():
            file.sync()
        assert self.place is not None
        state = {name: file.state for name, file in self.files.items()}
        place = [str(self.place.source), self.place.record]
        saved = {"identity": self.identity, "place": place, "tally": asdict(self.tally), "files": state}
        write_json(self.folder / "progress.json", {**saved, "checksum": manifest_checksum(saved)})
        self._committed = time.monotonic()

    def finish(self, manifest: dict[str, Any]) -> None:
        """Writes the manifest, which makes the folder a store."""
        for file in self.files.values():
            file.sync()
        manifest = manifest | {"block_bytes": BLOCK, "files": {name: file.state for name, file in self.files.items()}}
        write_json(self.folder / "manifest.json", {**manifest, "checksum": manifest_checksum(manifest)})
        self.tally.skipped.log()

    def close(self) -> None:
        """Closes the files."""
        for file in self.files.values():
            file.close()


def _read_progress(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What a run with the same identity has saved, None if there is nothing or it is damaged."""
    if not path.is_file():
        return None
    try:
        saved = read_json_object(path)
        saved.setdefault("checksum", None)
        if not _is_whole(saved):
            raise ValueError(f"{path} is damaged.")
        if saved["identity"] != identity:
            raise ValueError(f"{path} is of other text, another tokenizer or another version.")
    except ValueError as error:
        log.warning("Tokenising begins anew: %s", error)
        return None
    return saved


def _is_whole(saved: dict[str, Any]) -> bool:
    """Whether nothing of a state has changed; of one without a checksum, as earlier versions wrote, the form counts."""
    if saved["checksum"] is not None:
        return bool(saved["checksum"] == manifest_checksum(saved))
    try:
        Tally(**{**saved["tally"], "skipped": Skipped(**saved["tally"]["skipped"])})
        source, record = saved["place"]
        lengths = [saved["files"][name]["bytes"] for name in FILES]
        blocks = [len(saved["files"][name]["blocks"]) for name in FILES]
        covered = [-(-length // BLOCK) for length in lengths]
    except (KeyError, TypeError, ValueError):
        return False
    typed = isinstance(source, str) and all(isinstance(number, int) for number in (record, *lengths))
    return typed and "identity" in saved and blocks == covered


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Hash of all entries but the checksum itself."""
    entries = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


class _Bar:
    """Progress on standard error: how much was read, tokens a second, time left.

    It appears after two seconds. Where standard error is no terminal it is a line every half minute.
    """

    def __init__(self, documents: Iterable[Document | str], tally: Tally) -> None:
        self._reading = documents if isinstance(documents, Reading) else None
        self._first, self._start = tally.tokens, time.monotonic()
        self._bar: Any = None

    def show(self, tally: Tally) -> None:
        """Brings the bar up to date."""
        done, total = self._reading.progress() if self._reading is not None else (tally.documents, None)
        if self._bar is None:
            unit = self._reading.unit if self._reading is not None else " documents"
            often = 0.5 if sys.stderr.isatty() else 30.0
            self._bar = tqdm(
                desc="Tokenising", total=total, unit=unit, unit_scale=True, delay=2, mininterval=often,
                initial=done if self._first else 0,
            )  # fmt: skip
        rate = (tally.tokens - self._first) / max(1e-3, time.monotonic() - self._start)
        self._bar.set_postfix_str(f"{tally.tokens / 1e6:,.1f} M tokens, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def write_store(
    folder: Path,
    documents: Iterable[Document | str],
    tokenizer: Any,
    workers: int | None = 0,
    fingerprint: str | None = None,
) -> None:
    """Makes a store, or finishes one that was cut; ``folder`` appears whole or not at all.

    Args:
        folder: The store; nothing is done if it is there.
        documents: What it will hold.
        tokenizer: A Hugging Face tokenizer.
        workers: Processes that tokenise; 0 works in this one, with the tokenizer's threads; None decides.
        fingerprint: All that the documents depend on. Without it nothing is left of a run that is cut, since a later
            one could not know whether its documents are the same.
    """
    encoder = Encoder(tokenizer)
    workers = _worth(documents) if workers is None else workers
    if fingerprint is None:
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        try:
            _write(partial, folder, documents, encoder, tokenizer, workers, None)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return
    with hold(folder.with_name(f".{folder.name}.lock"), folder, wait=True):
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.partial")
            _write(partial, folder, documents, encoder, tokenizer, workers, fingerprint)


def _worth(documents: Iterable[Document | str]) -> int:
    """Processes that pay for their start: one for each core, none for files of little text."""
    if isinstance(documents, Reading) and documents.unit == "B" and (documents.progress()[1] or 0) < LITTLE:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write(
    partial: Path,
    folder: Path,
    documents: Iterable[Document | str],
    encoder: Encoder,
    tokenizer: Any,
    workers: int,
    fingerprint: str | None,
) -> None:
    if not (partial / "manifest.json").exists():
        identity = {"format": FORMAT, "tokenizer": encoder.fingerprint, "corpus": fingerprint}
        with closing(StoreWriter(partial, identity)) as writer, closing(_Bar(documents, writer.tally)) as bar:
            if writer.place is not None:
                log.info("Going on after %d documents in %s", writer.tally.documents, partial)
            for part in parts(documents, encoder, workers, writer.place):
                writer.add(part)
                bar.show(writer.tally)
            writer.finish(writer.tally.manifest(encoder, tokenizer, fingerprint))
    (partial / "progress.json").unlink(missing_ok=True)
    publish(partial, folder)


def publish(partial: Path, folder: Path) -> None:
    """Moves a finished folder to its place in one step; removes it if another process has put one there."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial, ignore_errors=True)
