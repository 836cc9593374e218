"""Negative log-likelihood without the logits of a whole row.

The logits of one 128k-token row take 62.6 GiB in float32 at a vocabulary of 128k, so the output layer and the
cross entropy run over chunks of tokens. Training has a choice of what becomes of a chunk:

    checkpointed   its logits are computed again in the backward pass
    fused          its gradients are made in the forward pass, which forgets the logits; in float16 the one above
    liger          the same in one kernel of Liger (arXiv:2410.10989), for plain output layers on a GPU

Shapes: N tokens, H hidden size, V vocabulary. Losses are in nats.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lightning_longrope.heads import Head, HeadLogits, OutputHead

Loss = Literal["checkpointed", "fused", "liger"]
INSTEAD = "take `loss: fused`"
ROWS_AT_A_TIME = 8192
"""Rows of the weight of an output layer whose gradient is computed at a time."""


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
    # results kept one by one would lie between the logits of chunks and part what these leave free
    found = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        for states, targets, part in zip(hidden.split(chunk), labels.split(chunk), found.split(chunk), strict=True):
            part.copy_(_chunk_nll(head, states, targets))
    return found


def _kept(labels: Tensor, weights: Tensor | None) -> Tensor:
    """Weight of each token, [N] float32."""
    kept = (labels != -100).float()
    return kept if weights is None else weights.float() * kept


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
    weights = _kept(labels, weights)
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


def fused_nll(
    hidden: Tensor, head: OutputHead, labels: Tensor, weights: Tensor | None = None, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """What ``chunked_nll`` gives, with gradients that the forward pass has made: no logits are computed twice.

    The gradients of parameters are added up in float32, and held from the forward pass on. It can be differentiated
    once. It is ``chunked_nll`` itself where ZeRO stage 3 partitions layers inside the output layer (adapters), and in
    float16, where sums over tokens that nothing has divided or scaled yet end at 65,504.

    Args:
        hidden: Hidden states that predict the labels, [N, H].
        head: The output head; adapters, biases and tied embeddings get their gradients too.
        labels: Token to be predicted at each position, [N] int64; -100 counts for nothing.
        weights: Weight of each token in both sums, [N]; 1 where it is not given.
        chunk: Tokens whose logits exist at a time.

    Returns:
        The weighted nll sum in nats and the weight sum, two float32 scalars.
    """
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or head.trained)
    if not differentiable or head.partitioned_inside or _in_float16(hidden):
        return chunked_nll(hidden, head, labels, weights, chunk)
    shares = _kept(labels, weights)

    def work(logits: HeadLogits, states: Tensor) -> Tensor:
        with torch.no_grad():
            sums = _sums(logits, states, labels, shares, chunk)
        return cast("Tensor", _Sums.apply(sums, states, *head.trained))

    return head.within(work, hidden), shares.sum()


def _in_float16(hidden: Tensor) -> bool:
    """Whether logits of hidden states are float16, by their own type or by autocast."""
    device = hidden.device.type
    cast_to = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return torch.float16 in (hidden.dtype, cast_to)


class _Found(NamedTuple):
    """The weighted nll sum and its gradients, those of parameters in the order of ``OutputHead.trained``."""

    nll: Tensor
    hidden: Tensor | None
    parameters: list[Tensor]


def _sums(logits: HeadLogits, hidden: Tensor, labels: Tensor, weights: Tensor, chunk: int) -> _Found:
    """Adds up chunks; what a parameter's gradient is added up in is as large as the parameter in float32."""
    parameters = logits.head.trained
    total = hidden.new_zeros((), dtype=torch.float32)
    slopes = torch.empty_like(hidden) if hidden.requires_grad else None
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    add_chunk = _add_linear_chunk if logits.linear is not None else _add_chunk
    parts = zip(hidden.split(chunk), labels.split(chunk), weights.split(chunk), strict=True)
    for number, (states, targets, shares) in enumerate(parts):
        # what counts for nothing is 0, not its gradient times 0: it may be NaN
        states = states.masked_fill((shares == 0)[:, None], 0).requires_grad_(slopes is not None)
        nll, of_states = add_chunk(logits, states, targets, shares, sums)
        total += nll
        if slopes is not None and of_states is not None:
            slopes[number * chunk : (number + 1) * chunk] = of_states
    return _Found(total, slopes, [one.to(of.dtype) for one, of in zip(sums, parameters, strict=True)])


def _add_chunk(
    logits: HeadLogits, hidden: Tensor, labels: Tensor, weights: Tensor, sums: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Adds the gradients of a chunk to those of parameters; its nll sum and the gradient of its hidden states."""
    with torch.enable_grad():
        values = logits(hidden)
    nll, slope = _nll_and_slope(values.detach(), labels, weights)
    wanted = [tensor for tensor in (*logits.head.trained, hidden) if tensor.requires_grad]
    found = torch.autograd.grad(values, wanted, slope * weights[:, None].to(slope.dtype))
    for one, other in zip(sums, found, strict=False):  # of which the hidden states' comes last
        one += other
    return nll, found[-1] if hidden.requires_grad else None


def _add_linear_chunk(
    logits: HeadLogits, hidden: Tensor, labels: Tensor, weights: Tensor, sums: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """What ``_add_chunk`` does, without a gradient of the whole weight for every chunk beside the sum.

    Weights of tokens go to the narrow side of every product, which is [n, H] and not [n, V].
    """
    layer, shares = logits.linear, weights[:, None]
    assert layer is not None
    values = F.linear(hidden, layer.weight, layer.bias).requires_grad_()
    with torch.enable_grad():
        finished = logits.finished(values)
    nll, slope = _nll_and_slope(finished.detach(), labels, weights)
    if finished is not values:
        (slope,) = torch.autograd.grad(finished, values, slope)
    for parameter, one in zip(logits.head.trained, sums, strict=True):
        if parameter is layer.bias:
            one += (slope * shares).sum(0, dtype=torch.float32)
        else:
            _add_product(one, slope, (hidden.detach() * shares).to(slope.dtype))
    return nll, (slope @ layer.weight) * shares if hidden.requires_grad else None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds ``left.T @ right`` to a float32 tensor [V, H] in place, of [n, V] and [n, H] in one type."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
        return
    for rows, of_rows in zip(total.split(ROWS_AT_A_TIME), left.split(ROWS_AT_A_TIME, dim=1), strict=True):
        rows += of_rows.T @ right


def _nll_and_slope(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted nll sum of logits [n, V], and the gradient of the sum without weights, in their type.

    The sum of the exponentials is read off the likeliest token, whose probability never underflows: one pass over the
    logits less than a softmax and a log-softmax.
    """
    slope = torch.softmax(logits, dim=-1, dtype=torch.float32)
    places = labels.masked_fill(labels == -100, 0)[:, None]
    behind = (logits.amax(-1) - logits.gather(1, places)[:, 0].float()) - slope.amax(-1).log()
    slope.scatter_add_(1, places, slope.new_full(places.shape, -1.0))  # softmax - one hot
    return (behind * weights).sum(), slope.to(logits.dtype)


class _Sums(torch.autograd.Function):
    """The sum that was found, whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, found: _Found, *inputs: Tensor) -> Tensor:
        ctx.found = found
        return found.nll.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.found is None:
            raise RuntimeError("A fused loss can be differentiated once: take loss='checkpointed' to do it again.")
        found, ctx.found = ctx.found, None
        of_hidden = None if found.hidden is None else found.hidden.mul_(slope)
        return None, of_hidden, *(one.mul_(slope) for one in found.parameters)


def liger_nll(
    hidden: Tensor, head: OutputHead, labels: Tensor, weights: Tensor | None = None, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """What ``fused_nll`` gives, by a kernel of Liger, which cuts the tokens itself.

    Args:
        hidden: Hidden states that predict the labels, [N, H], on a GPU.
        head: The output head.
        labels: Token to be predicted at each position, [N] int64; -100 counts for nothing.
        weights: Must be None.
        chunk: Of no effect.

    Returns:
        The nll sum in nats and the number of labels, two float32 scalars.

    Raises:
        ImportError: If Liger is not installed.
        ValueError: If there is no GPU, or the output layer or the weights are none that its kernel takes.
    """
    check_liger(head, hidden.device)
    if weights is not None:
        raise ValueError(f"`loss: liger` takes no weights per token, and the batch has some: {INSTEAD}.")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    kernel, layer = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32), head.module
    return kernel(layer.weight, hidden, labels, layer.bias).float(), _kept(labels, None).sum()


def check_liger(head: OutputHead, device: torch.device) -> None:
    """Refuses what Liger's kernel does not take.

    Raises:
        ImportError: If Liger is not installed.
        ValueError: If there is no GPU, or logits are more than a linear layer with its whole weight gives.
    """
    if find_spec("liger_kernel") is None:
        raise ImportError('`loss: liger` needs Liger: pip install "lightning-longrope[liger]".')
    reasons = {
        f"runs on GPUs, and the model is on {device.type}": device.type != "cuda",
        "does not scale or cap logits as this model does": not head.plain,
        f"needs a linear output layer, got {type(head.module).__name__}": type(head.module) is not nn.Linear,
        "needs the whole weight of the output layer, which this strategy partitions": head.partitioned,
    }
    for reason, found in reasons.items():
        if found:
            raise ValueError(f"`loss: liger` {reason}: {INSTEAD}.")


LOSSES = {"checkpointed": chunked_nll, "fused": fused_nll, "liger": liger_nll}
"""What ``loss`` of a ``LongRoPEModule`` may name."""
