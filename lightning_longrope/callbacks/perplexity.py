"""Perplexity by length: the same excerpts cut into windows of each length."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_longrope import scoring
from lightning_longrope.callbacks.measurement import Measurement, MeasuringCallback, text_of
from lightning_longrope.metrics import DocumentSums, bootstrap_interval, bootstrap_ratio_interval, perplexity


class PerplexityByLength(MeasuringCallback):
    """Measures how well the model predicts text when it sees windows of a given length.

    Excerpts of the longest length are cut into windows that do not overlap, for each length anew, so every length is
    judged on the same text, but for what is left over at the end of an excerpt where a length does not divide the
    longest. A window begins with BOS where there is one and sees nothing before it; the first token of
    its text is not predicted. Does not slide: tokens early in a window have little context and count as much as late
    ones; the last tokens have a number of their own.

    Logs, as ``{metric}/{length}``:

    - ``perplexity``: token-weighted, ``exp(sum of nll / tokens)``;
    - ``perplexity_last{last}``: token-weighted over the last tokens of each window, where it predicts that many;
    - ``bits_per_byte``: nll in bits over UTF-8 bytes of the predicted text, comparable between tokenizers.

    All windows predict the same number of tokens, so the mean over windows of published tables is ``perplexity`` too.
    Intervals are 95 % bootstrap intervals over documents.

    Args:
        lengths: Lengths of the windows in tokens; the datamodule's ``seq_len`` by default.
        documents: Excerpts to measure on, over all ranks together.
        split: Split of the datamodule to take them from.
        batch_tokens: Tokens of a forward pass; a longer window goes alone.
        last: Size of the window's end that ``perplexity_last{last}`` is about, in tokens.
        seed: Chooses the excerpts.
        every_n_steps: Optimizer steps between two measurements of a fit; None measures at every validation.
        every_n_epochs: The same in epochs.

    Raises:
        ValueError: If a number is out of range, or in ``setup`` if the split has too few long documents.
    """

    def __init__(
        self,
        lengths: tuple[int, ...] | None = None,
        documents: int = 24,
        split: str = "validation",
        batch_tokens: int = 16384,
        last: int = 128,
        seed: int = 0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
    ) -> None:
        super().__init__(lengths, split, batch_tokens, seed, every_n_steps, every_n_epochs)
        if documents < 1 or last < 1:
            raise ValueError(f"`documents` and `last` must be at least 1, got {documents} and {last}.")
        self.documents = documents
        self.last = last
        self._tokenizer: Any = None
        self._excerpts = torch.empty(0, 0, dtype=torch.int64)
        self._bytes: dict[int, Tensor] = {}

    @override
    def prepare(self, datamodule: Any, lengths: Sequence[int]) -> None:
        self._excerpts = text_of(datamodule, "excerpts", self.split, self.documents, max(lengths), self.seed)
        self._tokenizer = datamodule.tokenizer
        if min(lengths) <= self._given:
            raise ValueError(f"`lengths` of PerplexityByLength must be above {self._given} tokens, got {min(lengths)}.")
        self._bytes = {}

    @override
    def measure_length(self, trainer: Trainer, module: LightningModule, length: int) -> list[Measurement]:
        windows = self._windows(length)
        nll, end = self._window_nll(trainer, module, windows.flatten(0, 1)).unbind(1)
        nll, end = nll.view(windows.shape[:2]), end.view(windows.shape[:2])
        count = torch.full_like(nll, length - self._given)

        def weighted(metric: str, sums: Tensor, tokens: Tensor) -> Measurement:
            sums, tokens = sums.sum(1), tokens.sum(1)
            self.sums[metric, length] = DocumentSums(tuple(sums.tolist()), tuple(tokens.tolist()))
            value = perplexity(sums.sum(), tokens.sum()).item()
            return Measurement(metric, length, None, value, *bootstrap_interval(sums, tokens, self.seed), n=len(sums))

        results = [weighted("perplexity", nll, count), self._bits_per_byte(nll, windows)]
        if length - self._given >= self.last:
            results.append(weighted(f"perplexity_last{self.last}", end, torch.full_like(end, self.last)))
        return results

    def _bits_per_byte(self, nll: Tensor, windows: Tensor) -> Measurement:
        """From the nll of every window in nats, [documents, windows of a document]."""
        bits, sizes = nll.sum(1) / math.log(2), self._window_bytes(windows).sum(1)
        value = (bits.sum() / sizes.sum()).item()
        interval = bootstrap_ratio_interval(bits, sizes, self.seed)
        return Measurement("bits_per_byte", windows.shape[-1], None, value, *interval, n=len(windows))

    @property
    def _given(self) -> int:
        """Tokens at the start of a window that are not predicted: the first of the text, and BOS before it."""
        return 1 if self._tokenizer.bos_token_id is None else 2

    def _windows(self, length: int) -> Tensor:
        """The excerpts cut into windows, [documents, windows of a document, length].

        Each begins with BOS where the tokenizer has one: without it models lose their attention sink, and the number
        would be about that and not about length.
        """
        bos = self._tokenizer.bos_token_id
        if bos is None:
            return self._excerpts.unfold(1, length, length)
        text = self._excerpts[:, 1:].unfold(1, length - 1, length - 1)
        return torch.cat([torch.full_like(text[..., :1], bos), text], dim=-1)

    def _window_nll(self, trainer: Trainer, module: LightningModule, windows: Tensor) -> Tensor:
        """Nll of each window and of its last tokens in nats, summed over tokens, [windows, 2] float64."""
        sums = torch.zeros(len(windows), 2, dtype=torch.float64)
        rows = self.rows(windows.shape[1])
        for start, counts in self.share(trainer, range(0, len(windows), rows)):
            nll = scoring.token_nll(module.model, windows[start : start + rows].to(module.device)).cpu().double()
            nll = nll[:, self._given - 1 :]
            if counts:
                sums[start : start + rows] = torch.stack([nll.sum(1), nll[:, -self.last :].sum(1)], dim=1)
        return self.sum_over_ranks(trainer, sums)

    def _window_bytes(self, windows: Tensor) -> Tensor:
        """UTF-8 bytes of every window's predicted text, [documents, windows of a document] float64.

        Special tokens have no bytes. A character cut in two by the edge of a window is off by up to 3 bytes.
        """
        length = windows.shape[-1]
        if length not in self._bytes:
            given = self._given
            flat = [self._text_bytes(w) - self._text_bytes(w[:given]) for w in windows.flatten(0, 1).tolist()]
            self._bytes[length] = torch.tensor(flat, dtype=torch.float64).view(windows.shape[:2])
        return self._bytes[length]

    def _text_bytes(self, tokens: list[int]) -> int:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode())
