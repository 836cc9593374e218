"""Negative log-likelihood without the logits of a whole row.

The logits of one 128k-token row take 62.6 GiB in float32 at a vocabulary of 128k, so the output layer and the
cross entropy run over chunks of tokens. For training each chunk is recomputed in the backward pass.

Shapes: N tokens, H hidden size, V vocabulary. Losses are in nats.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


def _chunk_nll(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), labels, ignore_index=-100, reduction="none")


def token_nll(hidden: Tensor, head: Head, labels: Tensor, chunk: int = 4096) -> Tensor:
    """Negative log-likelihood of each label, without gradients.

    Args:
        hidden: Hidden states that predict the labels, [N, H].
        head: Maps hidden states [n, H] to logits [n, V]; see ``model.output_head``.
        labels: Token to be predicted at each position, [N] int64; -100 gives 0.
        chunk: Tokens whose logits exist at a time.

    Returns:
        [N] float32, in nats.
    """
    with torch.no_grad():
        parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
        return torch.cat([_chunk_nll(head, states, targets) for states, targets in parts])


def chunked_nll(
    hidden: Tensor, head: Head, labels: Tensor, weights: Tensor | None = None, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """Weighted sum of negative log-likelihoods and the sum of the weights, to be divided once by the caller.

    Differentiable; where there is more than one chunk the backward pass computes each chunk's logits again.

    Args:
        hidden: Hidden states that predict the labels, [N, H].
        head: Maps hidden states [n, H] to logits [n, V].
        labels: Token to be predicted at each position, [N] int64; -100 counts for nothing.
        weights: Weight of each token in both sums, [N]; 1 where it is not given.
        chunk: Tokens whose logits exist at a time.

    Returns:
        The weighted nll sum in nats and the weight sum, two float32 scalars.
    """
    kept = (labels != -100).float()
    weights = kept if weights is None else weights.float() * kept
    total = hidden.new_zeros((), dtype=torch.float32)
    single = hidden.shape[0] <= chunk or not torch.is_grad_enabled()
    for states, targets, shares in zip(hidden.split(chunk), labels.split(chunk), weights.split(chunk), strict=True):
        nll = (
            _chunk_nll(head, states, targets)
            if single
            else checkpoint(_chunk_nll, head, states, targets, use_reentrant=False)
        )
        total = total + (nll * shares).sum()
    return total, weights.sum()
