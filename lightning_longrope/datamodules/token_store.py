"""Tokenised documents on disk: flat files that are memory-mapped, and a manifest that says what made them.

::

    tokens.bin       every document's tokens, one after another, uint16 or uint32, no markers between them
    documents.bin    [documents + 1] int64: document i is tokens[documents[i] : documents[i + 1]]
    sources.bin      [documents] uint16: the source of document i, a place in the manifest's source_names
    hashes.bin       [documents] uint64: hash of the tokens of document i, the same for the same tokens
    skipped.jsonl    the records that gave no document: kind, file, record, why
    manifest.json    tokenizer, vocabulary, counts, names of the sources, length and checksums of every file

Numbers are little-endian. A checksum (CRC-32) covers ``block_bytes`` of a file, so that damage has a place.
"""

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lightning_longrope.datamodules.hashing import Hasher
from lightning_longrope.datamodules.readers import Document
from lightning_longrope.datamodules.store_writing import (
    FILES,
    FORMAT,
    Tally,
    manifest_checksum,
    parts,
    write_store,
)
from lightning_longrope.packing import Documents
from lightning_longrope.reading import blaming, read_json_object
from lightning_longrope.tokenizing import Encoder, tokenizer_fingerprint

REMEDY = "Delete the store, and it is made again."
CHECKED = 1 << 28  # bytes of tokens; the checksums of more are not taken every time a store is opened


@dataclass(frozen=True)
class TokenStore:
    """Tokens of a text, where its documents begin and which source each is from.

    Attributes:
        tokens: All tokens, [N] uint16 or uint32; a memory map if the store is a folder.
        offsets: Where each document begins, and the end, [documents + 1] int64.
        sources: Where each document is from, as a place in ``source_names``, [documents] uint16.
        hashes: Hash of the tokens of each document, [documents] uint64.
        manifest: What ``manifest.json`` holds; in memory without the files and their checksums.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    sources: NDArray[np.uint16]
    hashes: NDArray[np.uint64]
    manifest: dict[str, Any]

    @property
    def documents(self) -> Documents:
        """The documents that hold any token."""
        index = (self.offsets[:-1], np.diff(self.offsets), self.sources, self.source_names, self.hashes)
        return Documents(self.tokens, *index).at_least(1)

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources in the order they were met; documents that name none are of source ``""``."""
        return tuple(self.manifest["source_names"])

    @classmethod
    def in_memory(cls, documents: Iterable[Document | str], tokenizer: Any) -> Self:
        """Tokenises ``documents`` without writing anything."""
        encoder, tally, hasher = Encoder(tokenizer), Tally(), Hasher()
        rows = [(np.empty(0, encoder.dtype), np.zeros(1, np.int64), np.empty(0, np.uint16), np.empty(0, np.uint64))]
        rows += [
            (part.tokens, *tally.add(part), hasher.add(part.tokens, part.lengths)) for part in parts(documents, encoder)
        ]
        tally.skipped.log()
        tokens, offsets, sources, hashes = map(np.concatenate, zip(*rows, strict=True))
        return cls(tokens, offsets, sources, hashes, tally.manifest(encoder, tokenizer))

    @classmethod
    def write(
        cls,
        folder: Path,
        documents: Iterable[Document | str],
        tokenizer: Any,
        workers: int = 0,
        fingerprint: str | None = None,
    ) -> Self:
        """Tokenises ``documents`` into ``folder``, which appears whole or not at all, and opens it.

        Does not touch a store that is there already: if another process was faster, its store is opened.

        Args:
            folder: The store.
            documents: What it will hold, in this order whatever the number of ``workers``.
            tokenizer: A Hugging Face tokenizer.
            workers: Processes that tokenise; 0 works in this one, with the tokenizer's threads. A script that asks for
                processes needs ``if __name__ == "__main__":``, since they are spawned.
            fingerprint: All that the documents depend on. With it a run that was cut goes on where it was; without it
                a cut run leaves nothing behind.
        """
        if not folder.is_dir():
            write_store(folder, documents, tokenizer, workers, fingerprint)
        return cls.open(folder, tokenizer)

    @classmethod
    def open(cls, folder: Path, tokenizer: Any) -> Self:
        """Opens a store.

        Raises:
            ValueError: If another tokenizer made it, or its files are damaged.
        """
        manifest = read_manifest(folder)
        problem = next(_foreign(folder, manifest, tokenizer), None) or next(_wrong_sizes(folder, manifest), None)
        if problem is None:
            problem = next(_wrong_blocks(folder, manifest, CHECKED), None)
        if problem is not None:
            raise ValueError(problem)
        path, dtype = folder / "tokens.bin", np.dtype(manifest["dtype"])
        tokens = np.memmap(path, dtype, "r") if manifest["tokens"] else np.empty(0, dtype)
        offsets = np.fromfile(folder / "documents.bin", np.int64)
        sources = np.fromfile(folder / "sources.bin", np.uint16)
        return cls(tokens, offsets, sources, np.fromfile(folder / "hashes.bin", np.uint64), manifest)


def find_damage(folder: Path, tokenizer: Any = None) -> list[str]:
    """Reads a whole store and says what is wrong with it, one line each; nothing if all is well.

    Args:
        folder: The store.
        tokenizer: The tokenizer it should be made with; None does not ask.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    foreign = [] if tokenizer is None else [*_foreign(folder, manifest, tokenizer)]
    return [*foreign, *_wrong_sizes(folder, manifest), *_wrong_blocks(folder, manifest)]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        ValueError: If there is none, or it is damaged, of another version or names other files than a store has.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no token store: it has no manifest.json.")
    try:
        manifest = read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). {REMEDY}") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"The token store {folder} is of another version. {REMEDY}")
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise ValueError(f"{path} is damaged: its checksum is another. {REMEDY}")
    with blaming(f"{path} is not what a store has. {REMEDY} It has"):
        _check_manifest(manifest)
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Refuses a manifest that names other files than a store has, or sizes that contradict its counts."""
    if set(manifest["files"]) != set(FILES):
        raise ValueError(f"the files {sorted(manifest['files'])} in place of {sorted(FILES)}")
    if manifest["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"tokens of the type {manifest['dtype']!r}")
    documents = manifest["documents"]
    sizes = {"tokens.bin": np.dtype(manifest["dtype"]).itemsize * manifest["tokens"]}
    sizes |= {"documents.bin": 8 * (documents + 1), "sources.bin": 2 * documents, "hashes.bin": 8 * documents}
    for name, size in sizes.items():
        if manifest["files"][name]["bytes"] != size:
            raise ValueError(f"{manifest['files'][name]['bytes']} bytes of {name}, where its counts need {size}")
    for state in manifest["files"].values():
        if len(state["blocks"]) != -(-state["bytes"] // manifest["block_bytes"]):
            raise ValueError(f"{len(state['blocks'])} checksums for {state['bytes']} bytes")


def _foreign(folder: Path, manifest: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    if manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
        yield (
            f"The token store {folder} was made with another tokenizer ({manifest['tokenizer_name'] or 'unnamed'}, of"
            f" {manifest['vocabulary']} tokens; this one is {getattr(tokenizer, 'name_or_path', '') or 'unnamed'}, of"
            f" {Encoder(tokenizer).vocabulary}): delete it or choose another `cache_dir`."
        )


def _wrong_sizes(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    for name, state in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != state["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            yield f"{path} is damaged: it {found}, but {state['bytes']} were written. {REMEDY}"


def _wrong_blocks(folder: Path, manifest: dict[str, Any], most: float = math.inf) -> Iterator[str]:
    """Reads every file whose size is right, but for tokens of more than ``most`` bytes."""
    for name, state in manifest["files"].items():
        path, size = folder / name, manifest["block_bytes"]
        if not path.is_file() or path.stat().st_size != state["bytes"]:
            continue
        if name == "tokens.bin" and state["bytes"] > most:
            continue
        with path.open("rb") as file:
            for number, checksum in enumerate(state["blocks"]):
                if zlib.crc32(file.read(size)) != checksum:
                    first, last = number * size, min((number + 1) * size, state["bytes"]) - 1
                    yield f"{path} is damaged: bytes {first} to {last} are not those that were written. {REMEDY}"
