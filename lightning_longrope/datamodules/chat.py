"""Instruction data: conversations, of which only the answers are learnt.

A stored token is twice its number, and one more if it is part of an answer. So conversations live in token stores and
rows like any other documents, and what is learnt of them lies with the tokens.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from lightning_longrope.datamodules.base import FILLER_LIMIT, digest
from lightning_longrope.datamodules.conversations import (
    Rendered,
    messages_of,
    render_conversation,
    template_of,
    tokenise_rendered,
)
from lightning_longrope.datamodules.packed import PackedTextDataModule
from lightning_longrope.datamodules.readers import TextOf
from lightning_longrope.datamodules.token_store import TokenStore
from lightning_longrope.packing import IGNORED, BestFitRows, Documents, Policy, Row, Rows, excerpts
from lightning_longrope.packing.best_fit import Bins
from lightning_longrope.reading import read_text
from lightning_longrope.tokenizing import tokenizer_fingerprint

log = logging.getLogger(__name__)


class ChatDataModule(PackedTextDataModule):
    """Conversations under the tokenizer's chat template, with a loss on the answers alone.

    A record is a conversation in any of the usual forms: ``messages`` (``role``, ``content``), ShareGPT's
    ``conversations`` (``from``, ``value``), ``prompt`` with ``completion``, or Alpaca's ``instruction``, ``input``,
    ``output``. Only what the assistant wrote is learnt, together with the token that ends its turn; what it was asked
    is read and has no loss, as in the fine-tuning for summaries of Position Interpolation (arXiv:2306.15595).

    The template decides which tokens there are: no BOS or EOS is added. Answers are found by its ``{% generation %}``
    marks, else by what the text grows by with each answer; a template that allows neither is refused.

    Batches hold different numbers of answer tokens, and those that ``accumulate_grad_batches`` adds up weigh the same
    each: a larger ``batch_size`` weighs every answer token alike.

    Conversations of different length share rows (``best_fit``) and do not see each other. ``longrope data --rows 3``
    shows rows with what is learnt in brackets.

    Args:
        chat_template: Jinja text or a file with it, instead of the tokenizer's own template.
        too_long: What becomes of a conversation longer than ``seq_len``: ``drop`` leaves it out, ``cut`` keeps its
            beginning if an answer is in it. Both are counted.
        packing: ``best_fit``: several conversations a row, isolated; ``padded``: one a row.
        options: The other arguments of ``PackedTextDataModule``.

    Raises:
        ValueError: If an option is unknown; on first use, if there is no chat template, or no conversation fits a row.
    """

    def __init__(
        self,
        chat_template: str | None = None,
        too_long: Literal["drop", "cut"] = "drop",
        packing: Literal["best_fit", "padded"] = "best_fit",
        **options: Any,
    ) -> None:
        if packing not in ("best_fit", "padded"):
            raise ValueError(f"`packing` of conversations must be best_fit or padded, got {packing!r}.")
        if too_long not in ("drop", "cut"):
            raise ValueError(f"`too_long` must be drop or cut, got {too_long!r}.")
        super().__init__(
            text_field="messages",
            packing="best_fit",
            isolate_documents=True,
            short_seq_len=None,
            short_share=0.5,
            **options,
        )
        self.chat_template = chat_template
        self.too_long = too_long
        self.padded = packing == "padded"

    @property
    def template(self) -> str:
        """The chat template that is used."""
        given = self.chat_template
        if given is not None and "{" not in given:
            given = read_text(Path(given).expanduser())
        return template_of(self.tokenizer, given)

    @property
    @override
    def store_tokenizer(self) -> "AnswerTokenizer":
        return AnswerTokenizer(self.tokenizer)

    @override
    def text_of(self) -> TextOf:
        return RenderedText(self.tokenizer, self.template)

    @override
    def split(self, stores: dict[str, TokenStore]) -> dict[str, Documents]:
        return {name: self._fitting(name, documents) for name, documents in super().split(stores).items()}

    @override
    def excerpts(self, split: str, count: int, length: int, seed: int = 0) -> Tensor:
        """Excerpts that do not overlap, [count, length] int64, without any marker but those of the template.

        Args:
            split: ``train``, ``validation`` or ``test``.
            count: Number of excerpts.
            length: Tokens of each.
            seed: Chooses conversations and places, together with the seed of the datamodule.
        """
        return torch.from_numpy(excerpts(self.documents(split), count, length, bos=None, seed=seed) >> 1)

    @override
    def filler(self, split: str) -> Tensor:
        return torch.from_numpy(self.documents(split).joined(FILLER_LIMIT) >> 1)

    @override
    def _text_name(self) -> str:
        if isinstance(self.text_of(), RenderedText):
            return self.text_field  # the template, on which the text depends too, is named below
        return super()._text_name()

    def _fingerprint(self, origin: Any) -> str:
        return digest(super()._fingerprint(origin), self.template)

    def _stores(self) -> dict[str, TokenStore]:
        stores = super()._stores()
        self._largest_token = max([-1, *(store.manifest["largest_token"] >> 1 for store in stores.values())])
        return stores

    def _rows(self, split: str, policy: Policy, **options: Any) -> Rows[Any]:
        pad = next((mark for mark in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if mark is not None), 0)
        own = {"seq_len": self.seq_len, "bos": None, "eos": None, "seed": self.seed, **options}
        rows = AnswerRows(self.documents(split), pad=pad, padded=self.padded, **own)
        log.info("%s: %d rows of %d tokens, %d of padding", split, len(rows), self.seq_len, rows.padding)
        return rows

    def _fitting(self, split: str, documents: Documents) -> Documents:
        """The conversations that fit a row, or their beginnings."""
        long = np.flatnonzero(documents.lengths > self.seq_len)
        shortest = int(documents.lengths.min(initial=np.iinfo(np.int64).max))
        gone = long
        if self.too_long == "cut":
            gone = np.array([one for one in long.tolist() if not _learnt(documents, one, self.seq_len)], np.int64)
            documents = replace(documents, lengths=np.minimum(documents.lengths, self.seq_len))
        kept = documents.select(np.delete(np.arange(len(documents)), gone))
        if len(long):
            log.warning(
                "%s: %d of %d conversations are longer than `seq_len` %d: %d dropped, %d cut.",
                *(split, len(long), len(documents), self.seq_len, len(gone), len(long) - len(gone)),
            )
        if len(documents) and not len(kept):
            raise ValueError(
                f"No conversation of the {split} split fits `seq_len` {self.seq_len}: the shortest of {len(documents)}"
                f" has {shortest} tokens. Take a longer `seq_len`"
                + (", or `too_long: cut`." * (self.too_long == "drop"))
            )
        return kept


def _learnt(documents: Documents, number: int, length: int) -> bool:
    """Whether the first tokens of a conversation, beyond the very first, hold any of an answer."""
    start = int(documents.starts[number])
    return bool((documents.tokens[start + 1 : start + length] & 1).any())


@dataclass(frozen=True)
class RenderedText:
    """A record's conversation under a template, as the text of a document: JSON of a ``Rendered``."""

    tokenizer: Any
    template: str

    def __call__(self, record: dict[str, Any]) -> str:
        """The text of a record; a ``ValueError`` says why it has none."""
        return json.dumps(render_conversation(messages_of(record), self.tokenizer, self.template), ensure_ascii=False)


@dataclass(frozen=True)
class AnswerTokenizer:
    """Tokenises what ``RenderedText`` gives, to twice the token's number and one more where it is an answer's.

    Has what a token store asks of a Hugging Face tokenizer.
    """

    tokenizer: Any
    whole_texts = True

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[NDArray[np.int64]]]:
        """``input_ids`` of every text; the options of a Hugging Face tokenizer are of no matter."""
        rows = []
        for text in texts:
            tokens, answer = tokenise_rendered(Rendered(*json.loads(text)), self.tokenizer)
            rows.append(2 * tokens + answer)
        return {"input_ids": rows}

    def __len__(self) -> int:
        return 2 * len(self.tokenizer)

    def get_vocab(self) -> dict[str, int]:
        """Names of the tokens and their largest numbers here; one name stands for how text is cut."""
        names = {name: 2 * number + 1 for name, number in self.tokenizer.get_vocab().items()}
        return {**names, tokenizer_fingerprint(self.tokenizer): 0}

    @property
    def name_or_path(self) -> str:
        """That of the tokenizer."""
        return str(getattr(self.tokenizer, "name_or_path", ""))


class AnswerRows(BestFitRows):
    """Rows of conversations that know which of their tokens are learnt.

    Args:
        documents: Conversations of at most ``seq_len`` tokens, as ``AnswerTokenizer`` makes them.
        pad: Token that fills rows.
        padded: Put every conversation in a row of its own.
        options: See ``Rows``.
    """

    def __init__(self, documents: Documents, *, pad: int, padded: bool, **options: Any) -> None:
        self.pad, self.padded = pad, padded
        self.isolated = not padded
        super().__init__(documents, **options)

    @override
    def _rows_of(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.arange(len(sizes)) if self.padded else super()._rows_of(sizes)

    @override
    def _cut(self, layout: Bins, number: int) -> Row:
        row = super()._cut(layout, number)
        tokens = row.tokens >> 1
        tokens[len(tokens) - row.padding :] = self.pad
        learnt = (row.tokens & 1 == 1) & (row.labels != IGNORED)
        return replace(row, tokens=tokens, labels=np.where(learnt, tokens, IGNORED), isolated=not self.padded)
