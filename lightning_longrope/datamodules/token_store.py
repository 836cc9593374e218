"""Tokenised documents on disk: one flat memory-mapped file, an index, and a manifest that says what made them.

::

    tokens.bin       every document's tokens, one after another, uint16 or uint32, no markers between them
    documents.npy    [documents + 1] int64: document i is tokens[documents[i] : documents[i + 1]]
    manifest.json    tokenizer and vocabulary, counts, checksum
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from lightning_longrope.files import write_json
from lightning_longrope.packing import Documents

FORMAT = 1
BATCH = 1 << 22  # characters given to the tokenizer at a time
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
        manifest: What ``manifest.json`` holds.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    manifest: dict[str, Any]

    @property
    def documents(self) -> Documents:
        """The documents that hold any token."""
        return Documents(self.tokens, self.offsets[:-1], np.diff(self.offsets)).at_least(1)

    @classmethod
    def in_memory(cls, texts: Iterable[str], tokenizer: Any) -> Self:
        """Tokenises ``texts`` without writing anything."""
        pieces, lengths, size = [], [0], 0
        for row, text_bytes in _tokenised(texts, tokenizer):
            pieces.append(row)
            lengths.append(len(row))
            size += text_bytes
        tokens = np.concatenate([np.empty(0, _dtype(tokenizer)), *pieces])
        offsets = np.cumsum(lengths, dtype=np.int64)
        return cls(tokens, offsets, _manifest(tokenizer, offsets, size, zlib.crc32(tokens.data)))

    @classmethod
    def write(cls, folder: Path, texts: Iterable[str], tokenizer: Any) -> Self:
        """Tokenises ``texts`` into ``folder``, which appears whole or not at all.

        Does not touch a store that is there already: if another process was faster, its store is opened.
        """
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)
        try:
            with (partial / "tokens.bin").open("wb") as file:
                offsets, size, checksum = _write_tokens(file, texts, tokenizer)
            np.save(partial / "documents.npy", offsets)
            write_json(partial / "manifest.json", _manifest(tokenizer, offsets, size, checksum))
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
        if manifest["format"] != FORMAT or manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
            raise ValueError(
                f"The token store {folder} was made with another tokenizer (of {manifest['vocabulary']} tokens; this"
                f" one has {_vocabulary(tokenizer)}): delete it or choose another `cache_dir`."
            )
        offsets = np.load(folder / "documents.npy")
        path, dtype = folder / "tokens.bin", np.dtype(manifest["dtype"])
        whole = path.stat().st_size == manifest["tokens"] * dtype.itemsize == int(offsets[-1]) * dtype.itemsize
        tokens = np.memmap(path, dtype=dtype, mode="r") if whole and manifest["tokens"] else np.empty(0, dtype)
        store = cls(tokens, offsets, manifest)
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


def _write_tokens(file: BinaryIO, texts: Iterable[str], tokenizer: Any) -> tuple[NDArray[np.int64], int, int]:
    """Offsets of the documents, bytes of their text, checksum of their tokens."""
    lengths, size, checksum = [0], 0, 0
    for row, text_bytes in _tokenised(texts, tokenizer):
        file.write(row.data)
        checksum = zlib.crc32(row.data, checksum)
        lengths.append(len(row))
        size += text_bytes
    file.flush()
    os.fsync(file.fileno())
    return np.cumsum(lengths, dtype=np.int64), size, checksum


def _tokenised(texts: Iterable[str], tokenizer: Any) -> Iterator[tuple[NDArray[Any], int]]:
    """Tokens of each text and its size in bytes; special tokens spelled out in a text are text."""
    dtype = _dtype(tokenizer)
    for batch in _batches(texts):
        rows = tokenizer(
            batch, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
        for text, row in zip(batch, rows, strict=True):
            yield np.array(row, dtype), len(text.encode())


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
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


def _manifest(tokenizer: Any, offsets: NDArray[np.int64], size: int, checksum: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocabulary": _vocabulary(tokenizer),
        "dtype": _dtype(tokenizer).name,
        "documents": len(offsets) - 1,
        "tokens": int(offsets[-1]),
        "text_bytes": size,
        "crc32": checksum,
    }
