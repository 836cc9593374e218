"""Text files of one's own, tokenised once and packed into rows of exactly the window."""

from pathlib import Path

import numpy as np
from typing_extensions import override

from lightning_longrope.datamodules.base import SPLITS, Corpus, TokenDataModule, digest
from lightning_longrope.datamodules.readers import OnError, expand, read_documents
from lightning_longrope.datamodules.token_store import TokenStore
from lightning_longrope.packing import Documents, Policy, epoch_permutation


class PackedTextDataModule(TokenDataModule):
    """Documents from JSON lines (``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst``), Parquet and text files.

    Either each split has files of its own, or one list of ``files`` is split by whole documents.

    Args:
        train_files: Files, folders or globs of the training split.
        val_files: The same of the validation split.
        test_files: The same of the test split.
        files: Instead of those three: files of all documents.
        val_share: Share of the documents of ``files`` in the validation split.
        test_share: The same in the test split.
        tokenizer: Hugging Face name or folder.
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
    ) -> None:
        base = (seq_len, batch_size, tokenizer, min_document_length, seed, num_workers, cache_dir)
        super().__init__(*base, packing, isolate_documents, short_seq_len, short_share)
        own = dict(zip(SPLITS, (train_files, val_files, test_files), strict=True))
        if bool(files) == any(own.values()):
            raise ValueError(
                "Give either `files` (with `val_share` and `test_share`) or `train_files`, `val_files` and"
                f" `test_files`, got {'both' if files else 'neither'}."
            )
        if min(val_share, test_share) < 0 or val_share + test_share >= 1:
            raise ValueError(
                "`val_share` and `test_share` must be at least 0 and together below 1,"
                f" got {val_share} and {test_share}."
            )
        if not files and (val_share or test_share):
            raise ValueError("`val_share` and `test_share` split `files`; with files for each split leave them at 0.")
        self.files = {"files": files} if files else {split: paths for split, paths in own.items() if paths}
        self.shares = {"validation": val_share, "test": test_share}
        self.text_field = text_field
        self.on_error: OnError = on_error

    @override
    def corpora(self) -> list[Corpus]:
        expanded = {name: expand(paths or []) for name, paths in self.files.items()}
        self._check_disjoint(expanded)
        return [self._corpus(name, files) for name, files in expanded.items()]

    @override
    def split(self, stores: dict[str, TokenStore]) -> dict[str, Documents]:
        if "files" not in stores:
            return super().split(stores)
        documents = stores["files"].documents
        order = epoch_permutation(len(documents), seed=self.seed, epoch=0, stream=2)
        splits, first = {}, 0
        for name, share in self.shares.items():
            if share:
                last = first + max(1, round(share * len(documents)))
                splits[name], first = documents.select(np.sort(order[first:last])), last
        return {"train": documents.select(np.sort(order[first:])), **splits}

    def _corpus(self, name: str, files: list[Path]) -> Corpus:
        states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        fingerprint = digest(states, self.text_field, self.on_error)
        return Corpus(name, fingerprint, lambda: read_documents(files, self.text_field, self.on_error))

    @staticmethod
    def _check_disjoint(files: dict[str, list[Path]]) -> None:
        """Raises ValueError if a file is in two splits."""
        owners: dict[Path, str] = {}
        for split, paths in files.items():
            for path in paths:
                if owners.setdefault(path, split) != split:
                    raise ValueError(f"{path} is in the {owners[path]} split and in the {split} split: choose one.")
