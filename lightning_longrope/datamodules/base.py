"""What every datamodule of this package does once its text is known: tokenise, pack, shard, resume, give excerpts."""

import hashlib
import json
import logging
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from typing_extensions import override

from lightning_longrope.datamodules.agreement import check_tokenizer, check_vocabulary
from lightning_longrope.datamodules.loader import ExtraRows, ResumableLoader, RowDataset, RowSampler, collate
from lightning_longrope.datamodules.readers import Document
from lightning_longrope.datamodules.store_writing import FORMAT, write_store
from lightning_longrope.datamodules.token_store import TokenStore
from lightning_longrope.mixing import Mixture
from lightning_longrope.packing import Documents, Policy, Rows, excerpts, longest_text, make_rows
from lightning_longrope.summary import SplitSummary, summarise
from lightning_longrope.tokenizing import tokenizer_fingerprint

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
FILLER_LIMIT = 1 << 22  # tokens


@dataclass(frozen=True)
class Corpus:
    """Text that becomes one token store.

    Attributes:
        name: Opens the name of its folder.
        fingerprint: All that the text depends on, as a string.
        documents: Reads the documents; a plain text is one of no source.
    """

    name: str
    fingerprint: str
    documents: Callable[[], Iterable[Document | str]]


class TokenDataModule(LightningDataModule):
    """Base of the datamodules: a subclass names its ``corpora`` and says how they make the splits.

    Args:
        seq_len: Tokens of a row, BOS and EOS included.
        batch_size: Rows of a batch on one device.
        tokenizer: Hugging Face name or folder; scripts may give a loaded tokenizer.
        min_document_length: Documents of fewer tokens are left out.
        seed: Of the split and of the order of documents and rows.
        num_workers: Processes that load rows.
        cache_dir: Folder for tokenised text; None keeps it in memory, tokenised anew by every process.
        packing: How documents become rows. ``concat``: joined and cut; ``document``: one long document per row;
            ``best_fit``: whole documents side by side, isolated; ``mixed``: short isolated documents for the model's
            original window and RoPE, and long rows, in batches of their own.
        isolate_documents: Whether the documents of a ``concat`` row do not see each other.
        short_seq_len: Longest document, or piece, of a short row of ``mixed``; the model's original window if None.
        short_share: Share of the text in short rows of ``mixed``.

    Raises:
        ValueError: If a number is too small or ``packing`` unknown.
    """

    def __init__(
        self,
        seq_len: int,
        batch_size: int,
        tokenizer: str | None,
        min_document_length: int,
        seed: int,
        num_workers: int,
        cache_dir: str | None,
        packing: Policy = "concat",
        isolate_documents: bool = False,
        short_seq_len: int | None = None,
        short_share: float = 0.5,
    ) -> None:
        super().__init__()
        if packing not in get_args(Policy):
            raise ValueError(f"`packing` must be one of {', '.join(get_args(Policy))}, got {packing!r}.")
        lowest = {"seq_len": (seq_len, 4), "batch_size": (batch_size, 1), "num_workers": (num_workers, 0)}
        lowest |= {"min_document_length": (min_document_length, 1), "seed": (seed, 0)}
        for name, (value, least) in lowest.items():
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.min_document_length = min_document_length
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.packing: Policy = packing
        self.isolate_documents = isolate_documents
        self.short_seq_len = short_seq_len
        self.short_share = short_share
        self._tokenizer: Any = tokenizer
        self._splits: dict[str, Documents] | None = None
        self._largest_token = -1
        self._too_short: dict[str, str] = {}

    def corpora(self) -> list[Corpus]:
        """The text, one token store each."""
        raise NotImplementedError

    def split(self, stores: dict[str, TokenStore]) -> dict[str, Documents]:
        """Documents of every split there is, from the stores by name; by default a store is named like its split."""
        return {name: store.documents for name, store in stores.items()}

    def default_tokenizer(self) -> Any:
        """The tokenizer where none was named: that of the model being trained."""
        model = getattr(self.trainer, "lightning_module", None)
        if (name := getattr(model, "name_or_path", None)) is not None:
            from lightning_longrope.loading import load_tokenizer

            return load_tokenizer(name, getattr(model, "trust_remote_code", False))
        raise ValueError(f"{type(self).__name__} needs `tokenizer`: the name or folder of a Hugging Face tokenizer.")

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, loaded when it is first asked for."""
        if self._tokenizer is None:
            self._tokenizer = self.default_tokenizer()
        elif isinstance(self._tokenizer, str | Path):
            from lightning_longrope.loading import load_tokenizer

            self._tokenizer = load_tokenizer(self._tokenizer)
        return self._tokenizer

    @property
    def store_tokenizer(self) -> Any:
        """What makes the tokens that are stored: the tokenizer, where documents are plain text."""
        return self.tokenizer

    @override
    def prepare_data(self) -> None:
        if self.cache_dir is not None:
            self.tokenise()

    def tokenise(self, workers: int | None = 0) -> dict[str, Path]:
        """Makes the token stores that are not in ``cache_dir`` yet, and finishes one that was cut.

        Args:
            workers: Processes that tokenise; 0 does it in this one, with the tokenizer's threads; None takes one for
                each core where there is enough text.

        Returns:
            The folder of each corpus.

        Raises:
            ValueError: If there is no ``cache_dir``.
        """
        if self.cache_dir is None:
            raise ValueError(f"{type(self).__name__} keeps its tokens in memory: name a `cache_dir` to write them to.")
        folders = {}
        for corpus in self.corpora():
            folders[corpus.name] = folder = self._folder(corpus, self.cache_dir)
            if not folder.is_dir():
                log.info("Tokenising %s to %s", corpus.name, folder)
                write_store(folder, corpus.documents(), self.store_tokenizer, workers, corpus.fingerprint)
        return folders

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._splits is not None:
            return
        found = self.split(self._stores())
        self._splits = {name: documents.at_least(self.min_document_length) for name, documents in found.items()}
        for name, documents in self._splits.items():
            log.info("%s: %d documents, %d tokens", name, len(documents), documents.total)
            if not len(documents) and len(found[name]):
                self._too_short[name] = longest_text(found[name].lengths, self.min_document_length)

    def documents(self, split: str) -> Documents:
        """The tokenised documents of a split that are long enough.

        Raises:
            ValueError: If there is no such split or no document in it.
        """
        self.setup()
        assert self._splits is not None
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
        if split not in self._splits:
            raise ValueError(f"{type(self).__name__} was given no text for the {split} split.")
        if not len(self._splits[split]):
            lengths = self._too_short.get(split, "it is empty")
            raise ValueError(
                f"The {split} split holds no document of at least `min_document_length` {self.min_document_length}"
                f" tokens: {lengths}. Give more text or a smaller bound."
            )
        return self._splits[split]

    def excerpts(self, split: str, count: int, length: int, seed: int = 0) -> Tensor:
        """Excerpts that do not overlap, [count, length] int64, from as many documents as can be; begin with BOS.

        Args:
            split: ``train``, ``validation`` or ``test``.
            count: Number of excerpts.
            length: Tokens of each, BOS included.
            seed: Chooses documents and places, together with the seed of the datamodule.

        Raises:
            ValueError: If the documents do not hold that many.
        """
        rows = excerpts(self.documents(split), count, length, bos=self.tokenizer.bos_token_id, seed=seed)
        return torch.from_numpy(rows)

    def filler(self, split: str) -> Tensor:
        """Text of a split to fill prompts with, [N] int64: documents joined without markers, the first 4 Mi tokens."""
        return torch.from_numpy(self.documents(split).joined(FILLER_LIMIT))

    def extra_rows(self) -> tuple[ExtraRows | None, float]:
        """Makes training rows of another kind, and their share of all; none by default."""
        return None, 0.0

    def mixture(self) -> Mixture | None:
        """Which training documents an epoch reads, if not all of them once."""
        return None

    def rows(self, split: str) -> Rows[Any]:
        """The rows of a split. Of validation and test they are in their order, and of ``mixed`` the long ones alone."""
        if split != "train":
            return self._rows(split, "concat" if self.packing == "mixed" else self.packing, shuffle=False)
        mixture, (_, share) = self.mixture(), self.extra_rows()
        order = {} if mixture is None else {"order": mixture}
        return self._rows("train", self.packing, extra_share=share, **order)

    def summaries(self) -> list[SplitSummary]:
        """What every split holds and yields."""
        self.setup()
        assert self._splits is not None
        mixtures = {"train": self.mixture()}
        return [
            summarise(split, self.documents(split), self.rows(split), mixtures.get(split))
            for split in SPLITS
            if split in self._splits
        ]

    @override
    def train_dataloader(self) -> ResumableLoader:
        return self._loader(RowDataset(self.rows("train"), self.extra_rows()[0]), training=True)

    @override
    def val_dataloader(self) -> ResumableLoader | list[Any]:
        return self._evaluation_loader("validation")

    @override
    def test_dataloader(self) -> ResumableLoader | list[Any]:
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> ResumableLoader | list[Any]:
        self.setup()
        assert self._splits is not None
        return self._loader(RowDataset(self.rows(split)), training=False) if split in self._splits else []

    def _rows(self, split: str, policy: Policy, **options: Any) -> Rows[Any]:
        if policy == "mixed":
            options |= {"short_seq_len": self.short_seq_len or self._original_length()}
            options |= {"short_share": self.short_share}
        if policy == "concat" and self.packing == "concat":
            options |= {"isolate": self.isolate_documents}
        markers = {"bos": self.tokenizer.bos_token_id, "eos": self.tokenizer.eos_token_id}
        rows = make_rows(policy, self.documents(split), seq_len=self.seq_len, seed=self.seed, **markers, **options)
        log.info(
            "%s: %s rows of %d tokens, %d tokens left out, %d of padding%s",
            *(split, ", ".join(f"{count} {kind}" for kind, count in rows.sections.items()), self.seq_len),
            *(rows.tail, rows.padding, "" if policy == "concat" else f", {rows.cuts} cuts in documents"),
        )
        return rows

    def _original_length(self) -> int:
        """Window of the pretrained model being trained."""
        model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        if model is None:
            raise ValueError("`packing: mixed` without a model being trained needs `short_seq_len`.")
        from lightning_longrope.model import installed_factors, rope_geometry

        factors = installed_factors(model)
        return factors.original_length if factors else rope_geometry(model.config).original_length

    def _loader(self, dataset: RowDataset, training: bool) -> ResumableLoader:
        check_vocabulary(self._largest_token, getattr(self._module, "model", None))
        sharding = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=RowSampler(dataset, **sharding, drop_last=training, batch_size=self.batch_size),
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_takes_no_part_in_ctrl_c,
        )

    def _stores(self) -> dict[str, TokenStore]:
        check_tokenizer(self.tokenizer, getattr(self._module, "name_or_path", None))
        stores = {corpus.name: self._store(corpus) for corpus in self.corpora()}
        marks = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        used = [store.manifest["largest_token"] for store in stores.values()]
        self._largest_token = max([-1, *used, *(mark for mark in marks if mark is not None)])
        return stores

    @property
    def _module(self) -> Any:
        """The module being trained, if there is one."""
        return getattr(self.trainer, "lightning_module", None)

    def _store(self, corpus: Corpus) -> TokenStore:
        if self.cache_dir is None:
            return TokenStore.in_memory(corpus.documents(), self.store_tokenizer)
        if (folder := self._folder(corpus, self.cache_dir)).is_dir():
            return TokenStore.open(folder, self.store_tokenizer)
        return TokenStore.write(folder, corpus.documents(), self.store_tokenizer, fingerprint=corpus.fingerprint)

    def _folder(self, corpus: Corpus, cache_dir: Path) -> Path:
        made_by = tokenizer_fingerprint(self.store_tokenizer)
        return cache_dir / f"{corpus.name}-{digest(FORMAT, corpus.fingerprint, made_by)}"


def digest(*parts: Any) -> str:
    """Short hash of values that JSON can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _takes_no_part_in_ctrl_c(worker: int) -> None:
    """A terminal sends SIGINT to all processes of a command, and the step under way still needs its rows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
