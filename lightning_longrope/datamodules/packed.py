"""Text of one's own, from files or the hub, tokenised once and packed into rows of exactly the window."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from lightning_longrope.datamodules.base import SPLITS, Corpus, TokenDataModule, digest
from lightning_longrope.datamodules.origins import Revisions, file_states, folder_states, lasting_name
from lightning_longrope.datamodules.readers import Document, OnError, SourceOf, TextOf, expand, read_documents
from lightning_longrope.datamodules.token_store import TokenStore
from lightning_longrope.mixing import Mixture
from lightning_longrope.packing import Documents, Policy, epoch_permutation

log = logging.getLogger(__name__)

SHARED = "files"
"""Name of the text that is split by shares."""


class PackedTextDataModule(TokenDataModule):
    """Documents from files (JSON lines, Parquet, text) or a hub data set, of one source or of many.

    Either each split has text of its own (``train_files``, ``val_files``, ``test_files``; ``hub`` with ``hub_splits``),
    or one text (``files``; ``hub``) is split by whole documents with ``val_share`` and ``test_share``.

    A document that is word for word in two splits stays in the one that is evaluated, and a warning counts the copies.

    The text is tokenised once, into ``cache_dir``: about 2 bytes a token (4 for vocabularies above 65,536), so a
    terabyte of English takes some 500 GB. ``longrope tokenize -c CONFIG`` does it ahead of time, with many processes.
    Another ``seq_len``, ``packing``, ``min_document_length``, split, weight or seed needs no second tokenising; other
    files, ``subsets`` or another tokenizer do, and so does another commit of a hub data set. ``longrope data -c
    CONFIG`` shows what came of it.

    Where ``source_field`` tells the sources apart, ``subsets`` chooses some of them and ``weights`` says how much of
    the training each is. Weights are shares of the tokens, whatever the sources hold: a small source is repeated, a
    large one is read in part, another part every epoch. ``long_length`` and ``long_weight`` make long documents more
    frequent within every source and leave the sources' shares as they are. Validation and test read every document
    once.

    Args:
        train_files: Files, folders or globs of the training split.
        val_files: The same of the validation split.
        test_files: The same of the test split.
        files: Instead of those three: files of all documents.
        val_share: Share of the documents of ``files`` or ``hub`` in the validation split.
        test_share: The same in the test split.
        tokenizer: Hugging Face name or folder; by default that of the model.
        seq_len: Tokens of a row, BOS and EOS included.
        batch_size: Rows of a batch on one device.
        text_field: Field of a JSON line or column of a Parquet file that holds the text.
        min_document_length: Documents of fewer tokens are left out.
        seed: Of the split and of the order of documents and rows.
        num_workers: Processes that load rows.
        cache_dir: Folder for tokenised text; None keeps it in memory, tokenised anew by every process.
        on_error: ``raise`` stops at a record that cannot be read, ``skip`` passes over it and counts.
        packing: How documents become rows: ``concat``, ``document``, ``best_fit``, ``mixed``; see ``TokenDataModule``.
        isolate_documents: Whether the documents of a ``concat`` row do not see each other.
        short_seq_len: Longest document, or piece, of a short row of ``mixed``; the model's original window if None.
        short_share: Share of the text in short rows of ``mixed``.
        source_field: Where the name of a record's source is: a dotted path such as ``meta.pile_set_name``, or
            ``@folder`` or ``@file`` for the name of the folder or of the file (without its endings) that it is in.
        subsets: Sources to read; the others are passed over and not tokenised.
        weights: Share of the training tokens by source, in numbers that need not sum to 1; 0 leaves a source out.
        long_length: Tokens from which a document is long.
        long_weight: How many times more often a long document is read than a short one of its source.
        hub: Instead of files: hub name of a data set, or ``name:configuration``.
        hub_splits: Its split for ``train``, ``validation`` and ``test``; ``{train: train}`` if None.
        streaming: Read the hub's data while it is downloaded, keeping only the tokens, instead of downloading it first.

    Raises:
        ValueError: If the files or shares do not say what each split is, or a number is too small.
    """

    def __init__(
        self,
        train_files: list[str] | None = None,
        val_files: list[str] | None = None,
        test_files: list[str] | None = None,
        files: list[str] | None = None,
        val_share: float = 0.0,
        test_share: float = 0.0,
        tokenizer: str | None = None,
        seq_len: int = 4096,
        batch_size: int = 1,
        text_field: str = "text",
        min_document_length: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = "~/.cache/lightning_longrope",
        on_error: OnError = "raise",
        packing: Policy = "concat",
        isolate_documents: bool = False,
        short_seq_len: int | None = None,
        short_share: float = 0.5,
        source_field: str | None = None,
        subsets: list[str] | None = None,
        weights: dict[str, float] | None = None,
        long_length: int | None = None,
        long_weight: float = 1.0,
        hub: str | None = None,
        hub_splits: dict[str, str] | None = None,
        streaming: bool = True,
    ) -> None:
        base = (seq_len, batch_size, tokenizer, min_document_length, seed, num_workers, cache_dir)
        super().__init__(*base, packing, isolate_documents, short_seq_len, short_share)
        own = dict(zip(SPLITS, (train_files, val_files, test_files), strict=True))
        self.shares = {"validation": val_share, "test": test_share}
        self.origins = _origins(
            {split: paths for split, paths in own.items() if paths}, files, hub, hub_splits, self.shares
        )
        self.text_field = text_field
        self.on_error: OnError = on_error
        self.source_field = source_field
        self.subsets = subsets
        self.weights = weights
        self.long_length, self.long_weight = long_length, long_weight
        self.streaming = streaming
        self._revisions = None if self.cache_dir is None else Revisions(self.cache_dir)
        self._check_mixing()

    def source_of(self) -> str | SourceOf | None:
        """Where the name of a record's source is: a dotted path or a function of the record and its file.

        The name of the token store holds the function's: one that does something else needs another name. An object
        that can be called, such as a frozen dataclass, is known by its ``repr``.
        """
        by_path: dict[str | None, SourceOf] = {"@folder": FolderName(), "@file": FileName()}
        return by_path.get(self.source_field, self.source_field)

    def text_of(self) -> str | TextOf:
        """Where the text of a record is: a field, or a function of the record, named like that of ``source_of``."""
        return self.text_field

    def pick(self, files: list[Path]) -> list[Path]:
        """Those of the files that hold documents of the chosen subsets; all, where only the records can tell."""
        return files

    @override
    def tokenise(self, workers: int | None = 0) -> dict[str, Path]:
        hubs = {hub_name(origin[0]) for origin in self.origins.values() if isinstance(origin, tuple)}
        for name in sorted(name for name in hubs if not Path(name).exists()):
            if self._revisions is not None:
                self._revisions.ask(name)
        return super().tokenise(workers)

    @override
    def corpora(self) -> list[Corpus]:
        files = {name: self._files(paths) for name, paths in self.origins.items() if isinstance(paths, list)}
        _check_disjoint(files)
        return [
            self._hub_corpus(name, *origin) if isinstance(origin, tuple) else self._file_corpus(name, files[name])
            for name, origin in self.origins.items()
        ]

    @override
    def split(self, stores: dict[str, TokenStore]) -> dict[str, Documents]:
        if SHARED not in stores:
            return without_copies(super().split(stores))
        documents = stores[SHARED].documents
        order = epoch_permutation(len(documents), seed=self.seed, epoch=0, stream=2)
        splits, first = {}, 0
        for name, share in self.shares.items():
            if share:
                last = first + max(1, round(share * len(documents)))
                splits[name], first = documents.select(np.sort(order[first:last])), last
        return without_copies({"train": documents.select(np.sort(order[first:])), **splits})

    @override
    def mixture(self) -> Mixture | None:
        if self.weights is None and self.long_length is None:
            return None
        documents = self.documents("train")
        assert documents.sources is not None, "a token store knows its sources"
        long = (self.long_length, self.long_weight)
        return Mixture(
            documents.lengths, documents.sources, documents.source_names, self.weights, *long, seed=self.seed
        )

    def _files(self, paths: list[str]) -> list[Path]:
        found = expand(paths)
        if not (picked := self.pick(found)):
            raise ValueError(
                f"None of the {len(found)} files at {', '.join(paths)} holds `subsets` {', '.join(self.subsets or ())}."
            )
        return picked

    def _file_corpus(self, name: str, files: list[Path]) -> Corpus:
        return Corpus(name, self._fingerprint(file_states(files)), lambda: self._read(files))

    def _hub_corpus(self, name: str, data_set: str, split: str) -> Corpus:
        name_of_set, revision = hub_name(data_set), None
        origin: list[Any] = [data_set, split]
        if Path(name_of_set).exists():
            origin.append(folder_states(Path(name_of_set)))
        elif self._revisions is not None and (revision := self._revisions.of(name_of_set)) is not None:
            origin.append(revision)
        return Corpus(name, self._fingerprint(origin), lambda: self._read_hub(data_set, split, revision))

    def _fingerprint(self, origin: Any) -> str:
        return digest(origin, self._text_name(), self.on_error, lasting_name(self.source_of()), self.subsets)

    def _text_name(self) -> str:
        text = self.text_of()
        return text if isinstance(text, str) else lasting_name(text)

    def _read(self, files: list[Path]) -> Iterable[Document]:
        return read_documents(files, self.text_of(), self.on_error, self.source_of(), self.subsets)

    def _read_hub(self, data_set: str, split: str, revision: str | None) -> Iterable[Document]:
        from lightning_longrope.datamodules.readers import read_hub

        name, _, config = data_set.partition(":")
        how = (self.streaming, self.text_of(), self.source_of(), self.on_error, self.subsets)
        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        return read_hub(name, config or None, split, *how, **options)

    def _check_mixing(self) -> None:
        if (self.subsets or self.weights) and self.source_of() is None:
            raise ValueError(
                "`subsets` and `weights` name sources, so `source_field` must say where a record's source is: a field,"
                " @folder or @file."
            )
        if left_out := sorted(set(self.weights or ()) - set(self.subsets or self.weights or ())):
            raise ValueError(f"`weights` names {', '.join(left_out)}, which `subsets` leaves out.")
        # Mistakes in the rest of the mixing show before the text is tokenised.
        Mixture(np.ones(1, np.int64), np.zeros(1, np.uint16), ("",), None, self.long_length, self.long_weight)


Origin = list[str] | tuple[str, str]
"""Paths, or a hub data set and its split."""


def hub_name(data_set: str) -> str:
    """The data set without its configuration."""
    return data_set.partition(":")[0]


def _origins(
    own: dict[str, list[str]],
    files: list[str] | None,
    hub: str | None,
    hub_splits: dict[str, str] | None,
    shares: dict[str, float],
) -> dict[str, Origin]:
    """Where the text of each store is, by its name: a split's, or ``SHARED``.

    Raises:
        ValueError: If that is said twice, or not at all, or the shares make no sense.
    """
    if (bool(own), bool(files), bool(hub)).count(True) != 1:
        given = [name for name, value in {"files for each split": own, "`files`": files, "`hub`": hub}.items() if value]
        raise ValueError(
            "Give either `files` (with `val_share` and `test_share`), or `train_files`, `val_files` and `test_files`,"
            f" or `hub`, got {' and '.join(given) or 'none of them'}."
        )
    if min(shares.values()) < 0 or sum(shares.values()) >= 1:
        values = " and ".join(map(str, shares.values()))
        raise ValueError(f"`val_share` and `test_share` must be at least 0 and together below 1, got {values}.")
    splits = hub_splits or {"train": "train"}
    if unknown := sorted(set(splits) - set(SPLITS)):
        raise ValueError(f"`hub_splits` knows {', '.join(SPLITS)}, got {', '.join(unknown)}.")
    if any(shares.values()) and (own or len(splits) > 1):
        raise ValueError("`val_share` and `test_share` split one text; where each split has its own leave them at 0.")
    if hub:
        return {SHARED if any(shares.values()) else split: (hub, theirs) for split, theirs in splits.items()}
    return {SHARED: files} if files else dict(own)


def without_copies(splits: dict[str, Documents]) -> dict[str, Documents]:
    """The splits, a document that is word for word in several kept in the last of train, validation and test alone.

    Raises:
        ValueError: If that leaves a split empty.
    """
    held, kept = np.empty(0, np.uint64), dict(splits)
    for split in (name for name in reversed(SPLITS) if name in splits):
        documents = splits[split]
        assert documents.hashes is not None, "a token store knows the hashes of its documents"
        copies = np.isin(documents.hashes, held)
        if copies.any():
            log.warning(
                "%s: %d of %d documents are in another split too, word for word, and left out here.",
                *(split, int(copies.sum()), len(documents)),
            )
            kept[split] = documents.select(np.flatnonzero(~copies))
            if copies.all():
                raise ValueError(f"All documents of the {split} split are in another split too: give it other text.")
        held = np.union1d(held, documents.hashes) if split != "train" else held
    return kept


def _check_disjoint(files: dict[str, list[Path]]) -> None:
    """Raises ValueError if a file is in two splits."""
    owners: dict[Path, str] = {}
    for split, paths in files.items():
        for path in paths:
            if (owner := owners.setdefault(path.resolve(), split)) != split:
                raise ValueError(f"{path} is in the {owner} split and in the {split} split: choose one.")


@dataclass(frozen=True)
class FolderName:
    """Name of the folder a record's file is in, as that of its source."""

    def __call__(self, record: dict[str, Any], file: Path) -> str:
        """The name."""
        return file.parent.name


@dataclass(frozen=True)
class FileName:
    """Name of a record's file without its endings, as that of its source."""

    def __call__(self, record: dict[str, Any], file: Path) -> str:
        """The name."""
        return file.name.split(".")[0]


def check_subsets(subsets: list[str] | None, known: tuple[str, ...]) -> None:
    """Raises ValueError if a name is not among the ``known`` ones."""
    if unknown := [name for name in subsets or () if name not in known]:
        raise ValueError(f"`subsets` names {', '.join(unknown)}, but there are {', '.join(known)}.")
