"""Tokenised documents on disk: one flat memory-mapped file, an index, and a manifest that says what made them.

::

    tokens.bin       every document's tokens, one after another, uint16 or uint32, no markers between them
    documents.npy    [documents + 1] int64: document i is tokens[documents[i] : documents[i + 1]]
    sources.npy      [documents] uint16: the source of document i, a place in the manifest's source_names
    manifest.json    tokenizer and vocabulary, counts, names of the sources, checksum
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from lightning_longrope.datamodules.readers import Document
from lightning_longrope.files import write_json
from lightning_longrope.packing import Documents

FORMAT = 2
BATCH = 1 << 22  # characters given to the tokenizer at a time
MOST_SOURCES = 1 << 16
CHECKED = 1 << 28  # bytes; the checksum of a larger file is not taken every time it is opened


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of all that decides how a tokenizer cuts text; markers around the text and padding do not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    else:
        parts = json.loads(backend.to_str())
        for name in ("truncation", "padding", "post_processor"):
            parts.pop(name, None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TokenStore:
    """Tokens of a text and where its documents begin.

    Attributes:
        tokens: All tokens, [N] uint16 or uint32; a memory map if the store is a folder.
        offsets: Where each document begins, and the end, [documents + 1] int64.
        sources: Where each document is from, as a place in ``source_names``, [documents] uint16.
        manifest: What ``manifest.json`` holds.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    sources: NDArray[np.uint16]
    manifest: dict[str, Any]

    @property
    def documents(self) -> Documents:
        """The documents that hold any token."""
        return Documents(self.tokens, self.offsets[:-1], np.diff(self.offsets), self.sources).at_least(1)

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources in the order they were met; documents that name none are of source ``""``."""
        return tuple(self.manifest["source_names"])

    @classmethod
    def in_memory(cls, documents: Iterable[Document | str], tokenizer: Any) -> Self:
        """Tokenises ``documents`` without writing anything."""
        index = _Index()
        tokens = np.concatenate([np.empty(0, _dtype(tokenizer)), *_tokenised(documents, tokenizer, index)])
        manifest = _manifest(tokenizer, index, zlib.crc32(tokens.data))
        return cls(tokens, index.offsets, np.array(index.sources, np.uint16), manifest)

    @classmethod
    def write(cls, folder: Path, documents: Iterable[Document | str], tokenizer: Any) -> Self:
        """Tokenises ``documents`` into ``folder``, which appears whole or not at all.

        Does not touch a store that is there already: if another process was faster, its store is opened.
        """
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)
        try:
            with (partial / "tokens.bin").open("wb") as file:
                index, checksum = _write_tokens(file, documents, tokenizer)
            np.save(partial / "documents.npy", index.offsets)
            np.save(partial / "sources.npy", np.array(index.sources, np.uint16))
            write_json(partial / "manifest.json", _manifest(tokenizer, index, checksum))
            publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return cls.open(folder, tokenizer)

    @classmethod
    def open(cls, folder: Path, tokenizer: Any) -> Self:
        """Opens a store.

        Raises:
            ValueError: If another tokenizer made it, or its files are damaged.
        """
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"The token store {folder} is of another version: delete it, and it is made again.")
        if manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
            raise ValueError(
                f"The token store {folder} was made with another tokenizer (of {manifest['vocabulary']} tokens; this"
                f" one has {_vocabulary(tokenizer)}): delete it or choose another `cache_dir`."
            )
        offsets, sources = np.load(folder / "documents.npy"), np.load(folder / "sources.npy")
        path, dtype = folder / "tokens.bin", np.dtype(manifest["dtype"])
        whole = path.stat().st_size == manifest["tokens"] * dtype.itemsize == int(offsets[-1]) * dtype.itemsize
        tokens = np.memmap(path, dtype=dtype, mode="r") if whole and manifest["tokens"] else np.empty(0, dtype)
        store = cls(tokens, offsets, sources, manifest)
        if not whole or (tokens.nbytes <= CHECKED and not store.verify()):
            raise ValueError(f"The token store {folder} is damaged: delete it, and it is made again.")
        return store

    def verify(self) -> bool:
        """Whether the tokens still have the manifest's checksum; reads all of them."""
        return zlib.crc32(self.tokens.data) == self.manifest["crc32"]


def publish(partial: Path, folder: Path) -> None:
    """Moves a finished folder to its place in one step; does nothing if another process has put one there."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


@dataclass
class _Index:
    """What is told of the documents while their tokens go by."""

    lengths: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    text_bytes: int = 0

    def add(self, document: Document, tokens: int) -> None:
        self.lengths.append(tokens)
        self.sources.append(self.names.setdefault(document.label, len(self.names)))
        self.text_bytes += len(document.text.encode())
        if len(self.names) > MOST_SOURCES:
            raise ValueError(
                f"The documents name more than {MOST_SOURCES} sources, the last {document.label!r}: `source_field`"
                " must name a field with the same value in many documents."
            )

    @property
    def offsets(self) -> NDArray[np.int64]:
        return np.cumsum([0, *self.lengths], dtype=np.int64)


def _write_tokens(file: BinaryIO, documents: Iterable[Document | str], tokenizer: Any) -> tuple[_Index, int]:
    """Index of the documents and checksum of their tokens."""
    index, checksum = _Index(), 0
    for row in _tokenised(documents, tokenizer, index):
        file.write(row.data)
        checksum = zlib.crc32(row.data, checksum)
    file.flush()
    os.fsync(file.fileno())
    return index, checksum


def _tokenised(documents: Iterable[Document | str], tokenizer: Any, index: _Index) -> Iterator[NDArray[Any]]:
    """Tokens of each document, which ``index`` takes note of; special tokens spelled out in a text are text."""
    dtype = _dtype(tokenizer)
    for batch in _batches(documents):
        rows = tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        for document, row in zip(batch, rows, strict=True):
            index.add(document, len(row))
            yield np.array(row, dtype)


def _batches(documents: Iterable[Document | str]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for item in documents:
        document = Document(item) if isinstance(item, str) else item
        batch.append(document)
        size += len(document.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _vocabulary(tokenizer: Any) -> int:
    """Number of token ids; more than the number of tokens where a vocabulary has gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def _dtype(tokenizer: Any) -> np.dtype[Any]:
    return np.dtype(np.uint16 if _vocabulary(tokenizer) <= 1 << 16 else np.uint32)


def _manifest(tokenizer: Any, index: _Index, checksum: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocabulary": _vocabulary(tokenizer),
        "dtype": _dtype(tokenizer).name,
        "documents": len(index.lengths),
        "tokens": sum(index.lengths),
        "text_bytes": index.text_bytes,
        "source_names": list(index.names),
        "crc32": checksum,
    }
