"""Perplexity under a sliding window, the protocol of published tables."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_longrope import scoring
from lightning_longrope.callbacks.measurement import Measurement, MeasuringCallback
from lightning_longrope.metrics import DocumentSums, bootstrap_interval, perplexity
from lightning_longrope.windows import Window, sliding_windows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pass:
    """Windows of one size that share a forward pass, each with the number of its document."""

    windows: tuple[tuple[int, Window], ...]


class SlidingPerplexity(MeasuringCallback):
    """Measures how well the model predicts documents when every token has nearly a full window of context.

    A window of each length slides over every document by ``stride`` tokens and predicts the tokens that are new to it;
    the first window of a document predicts all its tokens but the first. Only the positions that predict go through
    the output head, and windows of a size share forward passes. Every window begins with BOS where there is one, which
    counts as one of its tokens.

    A document shorter than a window is measured in one window with the context it has; how many there were is logged
    and kept in ``short_documents``.

    Logs, as ``{metric}/{length}``:

    - ``perplexity_sliding``: token-weighted, ``exp(sum of nll / tokens)``;
    - ``perplexity_window_mean``: ``exp`` of the mean over windows of their mean nll, the convention of published
      tables. The first windows, which predict most with little context, weigh as much as all others.

    Intervals are 95 % bootstrap intervals over documents.

    Args:
        lengths: Lengths of the windows in tokens; the datamodule's ``seq_len`` by default.
        stride: Tokens from one window to the next.
        documents: Documents to measure on, drawn from those that are long enough; all where there are fewer.
        document_length: Tokens of each document that are read from its beginning, the longest length by default, so
            that every length is judged on the same text.
        min_document_length: Documents of fewer tokens are left out; ``document_length`` by default.
        split: Split of the datamodule to take them from.
        batch_tokens: Tokens of a forward pass; a longer window goes alone.
        seed: Chooses the documents.
        every_n_steps: Optimizer steps between two measurements of a fit; None measures at every validation.
        every_n_epochs: The same in epochs.

    Raises:
        ValueError: If a number is out of range, or in ``setup`` if the split has no document that is long enough.
    """

    def __init__(
        self,
        lengths: tuple[int, ...] | None = None,
        stride: int = 256,
        documents: int = 10,
        document_length: int | None = None,
        min_document_length: int | None = None,
        split: str = "validation",
        batch_tokens: int = 16384,
        seed: int = 0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
    ) -> None:
        super().__init__(lengths, split, batch_tokens, seed, every_n_steps, every_n_epochs)
        if documents < 1 or stride < 1:
            raise ValueError(f"`documents` and `stride` must be at least 1, got {documents} and {stride}.")
        if min(document_length or 2, min_document_length or 2) < 2:
            raise ValueError(
                "`document_length` and `min_document_length` must be at least 2 tokens,"
                f" got {document_length} and {min_document_length}."
            )
        self.stride = stride
        self.documents = documents
        self.document_length = document_length
        self.min_document_length = min_document_length
        self.short_documents: dict[int, int] = {}
        self._texts: list[Tensor] = []
        self._bos: list[int] = []

    @override
    def prepare(self, datamodule: Any, lengths: Sequence[int]) -> None:
        bos = datamodule.tokenizer.bos_token_id
        self._bos = [] if bos is None else [bos]
        if self.stride >= min(lengths) - len(self._bos):
            raise ValueError(
                f"`stride` ({self.stride}) must be smaller than the text of the shortest window of SlidingPerplexity"
                f" ({min(lengths) - len(self._bos)} tokens)."
            )
        longest = self.document_length or max(lengths) - len(self._bos)
        self._texts = self._choose(datamodule.documents(self.split), longest, self.min_document_length or longest)
        texts = {length: length - len(self._bos) for length in lengths}
        self.short_documents = {
            length: sum(len(text) < window for text in self._texts) for length, window in texts.items()
        }
        for length, count in self.short_documents.items():
            if count:
                log.info("%d of %d documents are shorter than a window of %d tokens", count, len(self._texts), length)

    def _choose(self, documents: Any, longest: int, shortest: int) -> list[Tensor]:
        """The beginnings of the documents to measure on, each [at most ``longest``] int64."""
        enough = np.flatnonzero(documents.lengths >= max(2, shortest))
        if not len(enough):
            raise ValueError(
                f"The {self.split} split holds no document of at least {shortest} tokens (its longest has"
                f" {int(documents.lengths.max(initial=0))}): lower `lengths`, or `min_document_length` of"
                " SlidingPerplexity to measure shorter documents too."
            )
        if len(enough) < self.documents:
            log.info("Only %d documents of at least %d tokens: measuring on all of them", len(enough), shortest)
        chosen = np.random.default_rng(self.seed).permutation(enough)[: self.documents]
        ranges = [(int(documents.starts[d]), int(min(documents.lengths[d], longest))) for d in chosen]
        return [torch.from_numpy(documents.tokens[start : start + size].astype(np.int64)) for start, size in ranges]

    @override
    def measure_length(self, trainer: Trainer, module: LightningModule, length: int) -> list[Measurement]:
        nll, tokens, documents = self._window_sums(trainer, module, length)

        def by_document(values: Tensor) -> Tensor:
            return torch.zeros(len(self._texts), dtype=torch.float64).index_add(0, documents, values)

        def measurement(metric: str, sums: Tensor, weights: Tensor) -> Measurement:
            sums, weights = by_document(sums), by_document(weights)
            self.sums[metric, length] = DocumentSums(tuple(sums.tolist()), tuple(weights.tolist()))
            value = perplexity(sums.sum(), weights.sum()).item()
            interval = bootstrap_interval(sums, weights, self.seed)
            return Measurement(metric, length, None, value, *interval, n=len(self._texts))

        return [
            measurement("perplexity_sliding", nll, tokens),
            measurement("perplexity_window_mean", nll / tokens, torch.ones_like(tokens)),
        ]

    def _window_sums(self, trainer: Trainer, module: LightningModule, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Nll in nats, predicted tokens and document of every window, each [windows], in the order of the passes."""
        passes = list(self._passes(length))
        windows = [window for part in passes for window in part.windows]
        sums = torch.zeros(len(windows), dtype=torch.float64)
        begins = np.cumsum([0, *(len(part.windows) for part in passes)]).tolist()
        for number, counts in self.share(trainer, range(len(passes))):
            nll = self._nll(module, passes[number])
            if counts:
                sums[begins[number] : begins[number + 1]] = nll
        tokens = torch.tensor([float(window.predicted) for _, window in windows], dtype=torch.float64)
        return self.sum_over_ranks(trainer, sums), tokens, torch.tensor([document for document, _ in windows])

    def _passes(self, length: int) -> Iterator[_Pass]:
        """Every window of every document; those of a size and of as many predictions go together."""
        groups: dict[tuple[int, int], list[tuple[int, Window]]] = defaultdict(list)
        for number, text in enumerate(self._texts):
            for window in sliding_windows(len(text), length - len(self._bos), self.stride):
                groups[window.end - window.start, window.predicted].append((number, window))
        for (size, _), members in groups.items():
            rows = self.rows(size + len(self._bos))
            yield from (_Pass(tuple(members[start : start + rows])) for start in range(0, len(members), rows))

    def _nll(self, module: LightningModule, part: _Pass) -> Tensor:
        """Nll of each window in nats, summed over the tokens it predicts, [B] float64."""
        bos = torch.tensor(self._bos, dtype=torch.int64)
        rows = [torch.cat([bos, self._texts[number][window.start : window.end]]) for number, window in part.windows]
        predicted = part.windows[0][1].predicted
        nll = scoring.token_nll(module.model, torch.stack(rows).to(module.device), last=predicted)
        return nll.cpu().double().sum(1)
