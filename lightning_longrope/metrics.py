"""Numbers of an evaluation from sums: nll in nats, tokens, bytes, hits. None of them ever sees logits.

Sums of nll are float64, counts are int64, and there is one division at the end, so a batch of one long row weighs as
much as many short rows of the same tokens, and the order of the batches does not show. The functions are the
arithmetic; the `torchmetrics.Metric` classes add the state and the sum over ranks.

Shapes: W windows, N documents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


@dataclass(frozen=True)
class Measurement:
    """One number of an evaluation: a row of ``results.csv``.

    Attributes:
        metric: Name of the number, such as ``perplexity`` or ``passkey``.
        length: Tokens of the windows or prompts.
        depth: Where the needle was, in [0, 1]; None for the mean over depths and where there is no needle.
        value: The number.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        n: Documents or trials behind it.
    """

    metric: str
    length: int
    depth: float | None
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PositionMean:
    """Mean nll of the tokens at some positions of a window: a row of ``positions.csv``.

    Attributes:
        length: Tokens of the window.
        start: First position.
        end: Position after the last.
        nll: Mean nll in nats per token.
        low: Lower end of its 95 % interval over documents.
        high: Upper end of its 95 % interval.
        n: Documents behind it.
    """

    length: int
    start: int
    end: int
    nll: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class DocumentSums:
    """A perplexity before its division, by document: what a paired comparison of two models needs.

    Attributes:
        nll: Sum of the nll of each document in nats (or of the mean nll of each window), [N].
        weight: Predicted tokens (or windows) of each document, [N].
    """

    nll: tuple[float, ...]
    weight: tuple[float, ...]


def perplexity(nll_sum: Tensor, tokens: Tensor) -> Tensor:
    """Token-weighted perplexity, ``exp(nll_sum / tokens)``, elementwise; finite unless the nll itself is not."""
    return torch.exp(nll_sum.double() / tokens)


def bootstrap_ratio_interval(
    numerators: Sequence[float] | Tensor,
    denominators: Sequence[float] | Tensor,
    seed: int = 0,
    resamples: int = 1000,
) -> tuple[float, float]:
    """95 % interval of ``sum(numerators) / sum(denominators)`` over documents drawn again with replacement.

    One document gives an interval without width: nothing is known about the spread.

    Args:
        numerators: One number a document, [N].
        denominators: One weight a document, [N], positive.
        seed: Of the resampling; the same seed gives the same interval and touches no global random state.
        resamples: Number of times the documents are drawn.

    Returns:
        The 2.5 % and the 97.5 % point, float64.

    Raises:
        ValueError: If there is no document or the lengths differ.

    Source: Efron 1979, percentile bootstrap.
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if above.ndim != 1 or above.shape != below.shape or not above.size:
        raise ValueError(f"A bootstrap needs two equally long rows of numbers, got {above.shape} and {below.shape}.")
    draws = np.random.default_rng(seed).integers(above.size, size=(resamples, above.size))
    ratios = above[draws].sum(axis=1) / below[draws].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975], method="inverted_cdf")  # an observed value: inf stays inf, not nan
    return float(low), float(high)


def bootstrap_interval(
    nll_sums: Sequence[float] | Tensor, counts: Sequence[float] | Tensor, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """95 % interval of token-weighted perplexity over documents drawn again with replacement.

    Args:
        nll_sums: Sum of the nll of each document in nats, [N].
        counts: Predicted tokens of each document, [N].
        seed: Of the resampling.
        resamples: Number of times the documents are drawn.

    Returns:
        The 2.5 % and the 97.5 % point of ``exp(sum(nll_sums) / sum(counts))``, float64.
    """
    low, high = bootstrap_ratio_interval(nll_sums, counts, seed, resamples)
    with np.errstate(over="ignore"):
        return float(np.exp(low)), float(np.exp(high))


def paired_ratio(
    ours: DocumentSums, theirs: DocumentSums, seed: int = 0, resamples: int = 1000
) -> tuple[float, float, float]:
    """Ratio of two perplexities on the same documents and its 95 % interval, documents drawn for both at once.

    Most of the spread between documents is common to both and cancels, so the interval is mostly much narrower than
    the two intervals of their own make it look.

    Args:
        ours: Sums of the numerator.
        theirs: Sums of the denominator, of the same documents in the same order.
        seed: Of the resampling.
        resamples: Number of times the documents are drawn.

    Returns:
        ``perplexity(ours) / perplexity(theirs)`` and the 2.5 % and 97.5 % points, float64.

    Raises:
        ValueError: If the documents are not the same.
    """
    if ours.weight != theirs.weight or not ours.weight:
        raise ValueError(
            f"A paired comparison needs the same documents twice, got {len(ours.weight)} and {len(theirs.weight)}"
            " or others."
        )
    difference = np.subtract(ours.nll, theirs.nll)
    low, high = bootstrap_interval(difference.tolist(), ours.weight, seed, resamples)
    return float(np.exp(difference.sum() / np.sum(ours.weight))), low, high


class _Ratio(Metric):
    """Two sums, of numerators and of denominators, over all batches and all ranks."""

    is_differentiable = False
    full_state_update = False
    above: Tensor
    below: Tensor

    def __init__(self, above_dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("above", default=torch.zeros((), dtype=above_dtype), dist_reduce_fx="sum")
        self.add_state("below", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        # `.to(bfloat16)`, by which Lightning makes a module half, moves the sums and must not round them
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), *args, **kwargs)

    def _add(self, above: Tensor, below: Tensor) -> None:
        # not in place: a validation leaves sums made in inference mode, which no training may write to
        self.above = self.above + above.to(self.above.dtype).sum()
        self.below = self.below + torch.as_tensor(below, device=self.below.device).long().sum()


class Perplexity(_Ratio):
    """Token-weighted perplexity, ``exp(sum of nll / sum of tokens)``.

    Takes sums of nll, not logits: ``torchmetrics.text.Perplexity`` takes a logarithm of a probability that may have
    rounded to zero and is then infinite for good.

    Args:
        kwargs: Of `torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def update(self, nll_sum: Tensor, tokens: Tensor | int) -> None:
        """Add ``nll_sum`` nats (any shape, summed up) over ``tokens`` predicted tokens (any shape, summed up)."""
        self._add(nll_sum, torch.as_tensor(tokens))

    def compute(self) -> Tensor:
        """Perplexity of everything added so far, a float64 scalar."""
        return perplexity(self.above, self.below)


class WindowMeanPerplexity(_Ratio):
    """``exp`` of the mean over windows of their mean nll: the convention of the published tables of YaRN and LongRoPE.

    Every window weighs the same, whatever it predicts: under a sliding window the first one, which predicts all its
    tokens with little context, weighs as much as one that predicts only its last 256.

    Args:
        kwargs: Of `torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def update(self, nll_sums: Tensor, tokens: Tensor) -> None:
        """Add windows: the sum of the nll of each in nats, [W], and its predicted tokens, [W]."""
        self._add(nll_sums.double() / tokens, torch.tensor(nll_sums.numel()))

    def compute(self) -> Tensor:
        """Of all windows added so far, a float64 scalar."""
        return perplexity(self.above, self.below)


class BitsPerByte(_Ratio):
    """Nll in bits over bytes of the text predicted: comparable between tokenizers.

    Args:
        kwargs: Of `torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def update(self, nll_sum: Tensor, text_bytes: Tensor | int) -> None:
        """Add ``nll_sum`` nats (summed up) over ``text_bytes`` UTF-8 bytes of predicted text (summed up)."""
        self._add(nll_sum, torch.as_tensor(text_bytes))

    def compute(self) -> Tensor:
        """Bits per byte of everything added so far, a float64 scalar."""
        return self.above / self.below / math.log(2)


class RetrievalAccuracy(_Ratio):
    """Fraction of trials whose answer was right in every token.

    Args:
        kwargs: Of `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(above_dtype=torch.int64, **kwargs)

    def update(self, hits: Tensor | int, trials: Tensor | int) -> None:
        """Add ``trials`` trials of which ``hits`` were right (each summed up)."""
        self._add(torch.as_tensor(hits), torch.as_tensor(trials))

    def compute(self) -> Tensor:
        """Accuracy of everything added so far, a float64 scalar in [0, 1]."""
        return self.above.double() / self.below
