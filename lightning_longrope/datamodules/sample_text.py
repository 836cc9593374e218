"""Text that every Python installation has: enough to train a small model on in minutes, without a download."""

import os
import random
import shutil
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_longrope.datamodules.base import Corpus, TokenDataModule, digest
from lightning_longrope.datamodules.loader import ExtraRows
from lightning_longrope.datamodules.store_writing import publish
from lightning_longrope.files import naming
from lightning_longrope.locks import hold
from lightning_longrope.packing import Policy
from lightning_longrope.retrieval import PasskeyPrompts

SHORTEST, LONGEST, PART = 9_000, 60_000, 24_000  # bytes of a file, bytes of a file, characters of a part
LEFT_OUT = {"idlelib", "lib2to3", "encodings", "turtledemo", "pydoc_data", "site-packages", "dist-packages"}
VALIDATION_FILES, TEST_FILES = 30, 40
LEAST_TEXT = 5_000_000  # characters
BOS, EOS = "<|bos|>", "<|eos|>"


class SampleTextDataModule(TokenDataModule):
    """Sources of Python's standard library and its help topics, about 8.5 MB, with a tokenizer trained on the spot.

    Files of 9 to 60 kB are documents; longer ones and the help topics are cut at line ends into parts of about 24 kB.
    30 files are the validation split and 40 the test split; everything else, and all parts, is for training. The text
    differs between Python versions, so compare runs of one version only.

    Training rows may be mixed with passkey rows: a key hidden in text, asked for and answered. They come on top of the
    text, which is still read whole in every epoch.

    Args:
        seq_len: Tokens of a row, BOS and EOS included.
        batch_size: Rows of a batch on one device.
        vocab_size: Tokens of the tokenizer that is trained; digits stay single.
        tokenizer: Hugging Face name or folder of another tokenizer, instead of training one.
        passkey_share: Share of the training rows that are passkey rows, in [0, 1).
        passkey_questions: Most keys hidden and asked for in such a row; each row has 1 to that many.
        passkey_weight: Weight in the loss of an answer's tokens; all others have 1.
        seed: Of the split, of the order of documents and rows, and of the passkey rows.
        num_workers: Processes that load rows.
        cache_dir: Folder for the tokenizer and the tokens; None makes them anew in every process, in seconds.
        packing: How documents become rows: ``concat``, ``document``, ``best_fit``, ``mixed``; see ``TokenDataModule``.
        isolate_documents: Whether the documents of a ``concat`` row do not see each other.
        short_seq_len: Longest document, or piece, of a short row of ``mixed``; the model's original window if None.
        short_share: Share of the text in short rows of ``mixed``.

    Raises:
        ValueError: If a number is out of range; on first use, if this Python has under 5 MB of such text.
    """

    def __init__(
        self,
        seq_len: int = 128,
        batch_size: int = 32,
        vocab_size: int = 1024,
        tokenizer: str | None = None,
        passkey_share: float = 0.0,
        passkey_questions: int = 2,
        passkey_weight: float = 2.0,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        packing: Policy = "concat",
        isolate_documents: bool = False,
        short_seq_len: int | None = None,
        short_share: float = 0.5,
    ) -> None:
        base = (seq_len, batch_size, tokenizer, 1, seed, num_workers, cache_dir)
        super().__init__(*base, packing, isolate_documents, short_seq_len, short_share)
        if not 0 <= passkey_share < 1:
            raise ValueError(f"`passkey_share` must be at least 0 and below 1, got {passkey_share}.")
        if vocab_size < 258:
            raise ValueError(f"`vocab_size` must be at least 258 (every byte, BOS and EOS), got {vocab_size}.")
        self.vocab_size = vocab_size
        self.passkey_share = passkey_share
        self.passkey_questions = passkey_questions
        self.passkey_weight = passkey_weight

    @override
    def corpora(self) -> list[Corpus]:
        return [
            Corpus(split, digest(texts), lambda texts=texts: texts)  # type: ignore[misc]
            for split, texts in self._texts.items()
        ]

    @override
    def default_tokenizer(self) -> Any:
        """The tokenizer trained on the training split, from ``cache_dir`` if it is there."""
        texts = self._texts["train"]
        if self.cache_dir is None:
            return train_tokenizer(texts, self.vocab_size)
        folder = self.cache_dir / f"tokenizer-{digest(texts, self.vocab_size)}"
        if not folder.is_dir():
            with hold(folder.with_name(f".{folder.name}.lock"), folder, wait=True), naming(folder):
                if not folder.is_dir():  # nobody has made it meanwhile
                    partial = folder.with_name(f".{folder.name}.partial")
                    shutil.rmtree(partial, ignore_errors=True)
                    train_tokenizer(texts, self.vocab_size).save_pretrained(partial)
                    publish(partial, folder)
        from lightning_longrope.loading import load_tokenizer

        return load_tokenizer(folder)

    @override
    def extra_rows(self) -> tuple[ExtraRows | None, float]:
        if not self.passkey_share:
            return None, 0.0
        prompts = PasskeyPrompts(self.tokenizer, filler="text", text=self.filler("train"), seed=self.seed)
        prompts.row(self.seq_len, self.passkey_questions, random.Random(0))  # too many for the window: say so now
        return PasskeyRows(prompts, self.seq_len, self.passkey_questions, self.passkey_weight), self.passkey_share

    @cached_property
    def _texts(self) -> dict[str, list[str]]:
        sources = library_sources()
        files = [text for text in sources if len(text.encode()) <= LONGEST]
        parts = [part for text in sources if len(text.encode()) > LONGEST for part in cut(text)]
        return split_texts(files, parts + topic_parts(), self.seed)


@dataclass(frozen=True)
class PasskeyRows:
    """Training rows of hidden keys, with the weight of predicting each token."""

    prompts: PasskeyPrompts
    seq_len: int
    questions: int
    weight: float

    def __call__(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        """A row, [seq_len] int64, and its weights, [seq_len] float32."""
        tokens, answer = self.prompts.row(self.seq_len, rng.randint(1, self.questions), rng)
        return tokens, torch.where(answer, self.weight, 1.0)


def split_texts(files: list[str], parts: list[str], seed: int) -> dict[str, list[str]]:
    """Shares whole files among the splits; ``parts`` of something longer are all for training.

    Raises:
        ValueError: If there is too little text.
    """
    total = sum(map(len, files)) + sum(map(len, parts))
    held_out = VALIDATION_FILES + TEST_FILES
    if total < LEAST_TEXT or len(files) <= held_out:
        raise ValueError(
            f"The standard library of this Python holds {total / 1e6:.1f} MB of text in {len(files)} files, but at"
            f" least {LEAST_TEXT / 1e6:.0f} MB in more than {held_out} are needed: use a Python installed with its"
            " sources, or PackedTextDataModule with files of your own."
        )
    shuffled = random.Random(f"{seed}/split").sample(files, len(files))
    return {
        "train": shuffled[held_out:] + parts,
        "validation": shuffled[:VALIDATION_FILES],
        "test": shuffled[VALIDATION_FILES:held_out],
    }


def library_sources() -> list[str]:
    """Sources of at least ``SHORTEST`` bytes, each once, without tests, tables, and what this machine's build wrote."""
    texts: dict[str, None] = {}
    for path in _source_paths(Path(sysconfig.get_path("stdlib"))):
        try:
            texts[path.read_bytes().decode("utf-8")] = None
        except (UnicodeDecodeError, OSError):
            continue
    return [text for text in texts if len(text.encode()) >= SHORTEST]


def _source_paths(root: Path) -> list[Path]:
    """Python files of the library in an order that does not depend on the file system."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("test")]
        kept = (name for name in names if name.endswith(".py") and not name.startswith(("test", "_sysconfigdata")))
        paths += [Path(folder, name) for name in kept]
    return sorted(paths, key=lambda path: path.relative_to(root).parts)


def topic_parts() -> list[str]:
    """The texts behind Python's ``help()``, in parts; none where they are not installed."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return cut("\n\n".join(topics[name] for name in sorted(topics)))


def cut(text: str) -> list[str]:
    """Parts of about ``PART`` characters that end where a line does; together they are ``text``."""
    count = max(1, round(len(text) / PART))
    size = len(text) / count
    ends = [0, *(text.find("\n", int(size * i)) + 1 or len(text) for i in range(1, count)), len(text)]
    return [text[start:end] for start, end in zip(ends, ends[1:], strict=False) if end > start]


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """Byte-level BPE with single digits, BOS and EOS, as a Hugging Face tokenizer; the same text gives the same one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    model.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    marked = [(BOS, model.token_to_id(BOS))]
    model.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=marked)
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
