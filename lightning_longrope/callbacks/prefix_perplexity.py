"""Perplexity of the beginnings of documents, all lengths from one forward pass, and the curve by position."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_longrope import scoring
from lightning_longrope.callbacks.measurement import Measurement, MeasuringCallback, text_of
from lightning_longrope.metrics import (
    DocumentSums,
    PositionMean,
    bootstrap_interval,
    bootstrap_ratio_interval,
    perplexity,
)


class PrefixPerplexity(MeasuringCallback):
    """Measures how well the model predicts the first tokens of excerpts, for many lengths in one forward pass.

    A token sees only what stands before it, so the longest length gives every shorter one under the same factors:
    measuring k lengths costs what the longest costs. Different lengths are judged on different tokens, whereas
    ``PerplexityByLength`` judges every length on the same. Of tables by length, that of the longest serves all here.

    Logs ``perplexity_prefix/{length}``, token-weighted over the first ``length`` tokens. ``positions`` has the mean
    nll by position in the longest window: where it begins to rise, the window ends. Intervals are 95 % bootstrap
    intervals over excerpts.

    Args:
        lengths: Lengths of the prefixes in tokens, BOS included; the datamodule's ``seq_len`` by default.
        documents: Excerpts of the longest length to measure on.
        buckets: Number of equal parts of the longest window that ``positions`` has means of.
        split: Split of the datamodule to take them from.
        batch_tokens: Tokens of a forward pass; a longer excerpt goes alone.
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
        buckets: int = 32,
        split: str = "validation",
        batch_tokens: int = 16384,
        seed: int = 0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
    ) -> None:
        super().__init__(lengths, split, batch_tokens, seed, every_n_steps, every_n_epochs)
        if documents < 1 or buckets < 1:
            raise ValueError(f"`documents` and `buckets` must be at least 1, got {documents} and {buckets}.")
        self.documents = documents
        self.buckets = buckets
        self._excerpts = torch.empty(0, 0, dtype=torch.int64)
        self._given = 1

    @override
    def prepare(self, datamodule: Any, lengths: Sequence[int]) -> None:
        self._given = 1 if datamodule.tokenizer.bos_token_id is None else 2
        if min(lengths) <= self._given:
            raise ValueError(f"`lengths` of PrefixPerplexity must be above {self._given} tokens, got {min(lengths)}.")
        self._excerpts = text_of(datamodule, "excerpts", self.split, self.documents, max(lengths), self.seed)

    @override
    def measure_length(self, trainer: Trainer, module: LightningModule, length: int) -> list[Measurement]:
        return self.measure_lengths(trainer, module, [length])

    @override
    def measure_lengths(self, trainer: Trainer, module: LightningModule, lengths: Sequence[int]) -> list[Measurement]:
        longest = max(lengths)
        count = min(self.buckets, longest - self._given) + 1
        edges = torch.linspace(self._given, longest, count, dtype=torch.float64).round().long()  # not in the run's type
        borders = torch.cat([torch.tensor(lengths), edges]).unique()  # of parts that lie wholly in or out of a prefix
        parts = self._part_sums(trainer, module, longest, borders.tolist())
        until = torch.nn.functional.pad(parts.cumsum(1), (1, 0))  # nll before each border
        before = {border: until[:, place] for place, border in enumerate(borders.tolist())}
        if longest == self._excerpts.shape[1]:
            pairs = zip(edges.tolist(), edges[1:].tolist(), strict=False)
            self.positions = [self._mean(before[end] - before[start], start, end) for start, end in pairs]
        return [self._prefix(before[length], length) for length in lengths]

    def _prefix(self, nll: Tensor, length: int) -> Measurement:
        """Perplexity of a prefix from its nll, [documents]."""
        tokens = torch.full_like(nll, length - self._given)
        self.sums["perplexity_prefix", length] = DocumentSums(tuple(nll.tolist()), tuple(tokens.tolist()))
        value = perplexity(nll.sum(), tokens.sum()).item()
        interval = bootstrap_interval(nll, tokens, self.seed)
        return Measurement("perplexity_prefix", length, None, value, *interval, n=len(nll))

    def _mean(self, nll: Tensor, start: int, end: int) -> PositionMean:
        """Mean nll of the tokens from ``start`` to before ``end``, from their sums, [documents]."""
        tokens = torch.full_like(nll, end - start)
        interval = bootstrap_ratio_interval(nll, tokens, self.seed)
        mean = (nll.sum() / tokens.sum()).item()
        return PositionMean(self._excerpts.shape[1], start, end, mean, *interval, n=len(nll))

    def _part_sums(self, trainer: Trainer, module: LightningModule, longest: int, borders: list[int]) -> Tensor:
        """Nll in nats of every excerpt's tokens between two borders, [documents, borders - 1] float64."""
        rows = self.rows(longest)
        sums = torch.zeros(len(self._excerpts), len(borders) - 1, dtype=torch.float64)
        for start, counts in self.share(trainer, range(0, len(self._excerpts), rows)):
            input_ids = self._excerpts[start : start + rows, :longest].to(module.device)
            nll = scoring.token_nll(module.model, input_ids).cpu().double()
            pieces = nll[:, borders[0] - 1 :].split([b - a for a, b in zip(borders, borders[1:], strict=False)], dim=1)
            if counts:
                sums[start : start + rows] = torch.stack([piece.sum(1) for piece in pieces], dim=1)
        return self.sum_over_ranks(trainer, sums)
