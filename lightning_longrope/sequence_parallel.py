"""One row on many ranks: each holds a part of the tokens, and in attention all tokens of a part of the heads (Ulysses).

    tokens   0 ... 7 | 8 ... 15          2 ranks, 4 heads
    outside  rank 0  | rank 1            every head of the own tokens
    inside   rank 0: heads 0 and 1, rank 1: heads 2 and 3, of all tokens, as if the row were whole

All ranks of a group are given the same whole rows; ``model.hidden_states`` cuts them, so positions, the choice of a
rotary table, start tokens and the bounds of documents are those of the whole row. What it returns is the share of this
rank. That a model gives the same hidden states shared and whole is proved before it is relied on.

Shapes: B rows, S tokens of a row, P ranks of the group, H query heads, K key heads, D head size, C channels.
Source: DeepSpeed-Ulysses, arXiv:2309.14509; wiring and collectives are our own, on transformers' AttentionInterface.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_longrope.attention import Attention, probing, readers_of_a_key
from lightning_longrope.isolation import (
    OVER_RANKS,
    Stretches,
    attention_by_document,
    flash_keywords,
    in_computing_type,
    mask_by_document,
)

_sharing: ContextVar[bool] = ContextVar("sharing", default=False)


class SequenceGroup:
    """Ranks that hold one row together, in the order of its tokens.

    Args:
        group: Their process group; None is this process alone, which has whole rows.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def share_of(self, length: int) -> int:
        """Tokens of a row of ``length`` that each rank holds; the last ranks may have some of filling."""
        return -(-length // self.size)

    def cut(self, rows: Tensor, filling: int = 0) -> Tensor:
        """This rank's part of whole rows.

        Args:
            rows: One value per token, [B, S].
            filling: Value after the end of the rows, where P does not divide S.

        Returns:
            [B, ceil(S / P)].
        """
        share = self.share_of(rows.shape[1])
        whole = F.pad(rows, (0, share * self.size - rows.shape[1]), value=filling)
        return whole[:, self.rank * share : (self.rank + 1) * share].contiguous()

    def join(self, shares: Tensor, length: int) -> Tensor:
        """Whole rows from every rank's part, the same on each (an all-gather).

        Differentiable for a loss that every rank computes alike on whole rows: the mean of the ranks' gradients, which
        every strategy takes, is that of one process.

        Args:
            shares: The part of this rank, [B, ceil(S / P), ...].
            length: S, without the filling.

        Returns:
            [B, S, ...].
        """
        if self.group is None:
            return shares
        return cast("Tensor", _Join.apply(shares, self, length))

    @torch.no_grad()
    def take(self, shares: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Values at a few places of whole rows, the same on every rank.

        Args:
            shares: The part of this rank, [B, ceil(S / P), C].
            rows: Row of each place, [N] int64.
            positions: Position of each place in its whole row, [N] int64.

        Returns:
            [N, C].
        """
        local = positions - self.rank * shares.shape[1]
        own = (local >= 0) & (local < shares.shape[1])
        values = torch.where(own[:, None], shares[rows, local.clamp(0, shares.shape[1] - 1)], 0)
        if self.group is None:
            return values
        total = _real(values)
        dist.all_reduce(total, group=self.group)
        return total.to(shares.device)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is up on one of the ranks at least."""
        if self.group is None:
            return flag
        up = torch.tensor(int(flag), device=device)
        dist.all_reduce(up, group=self.group)
        return bool(up.item())

    def alike(self, rows: Tensor) -> bool:
        """Whether every rank has these rows of integers, [B, S]: of the same shape and, by their sums, content."""
        if self.group is None:
            return True
        places = torch.arange(1, rows.shape[1] + 1, device=rows.device) % 8191
        found = torch.stack([*map(rows.new_tensor, rows.shape), rows.sum(), (rows * places).sum()])
        lowest, highest = found.clone(), found.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN, self.group)
        dist.all_reduce(highest, dist.ReduceOp.MAX, self.group)
        return bool(torch.equal(lowest, highest))


ALONE = SequenceGroup()


def sequence_group(model: nn.Module) -> SequenceGroup:
    """The ranks that share the rows of a model; this one alone if nothing was said."""
    return getattr(model, "sequence_group", ALONE)


def share_rows(model: PreTrainedModel, group: SequenceGroup) -> None:
    """From now on the rows of a model are shared by a group of ranks; every rank of the group calls this.

    Args:
        model: A Hugging Face causal language model, on its device, with equal weights on all ranks.
        group: The ranks.

    Raises:
        ValueError: If the group's size does not divide the attention heads, or the attention cannot be shared.
        RuntimeError: If the model gives other hidden states with shared rows than with whole ones.
    """
    if group.size == 1:
        model.sequence_group = group
        return
    heads = model.config.get_text_config().num_attention_heads
    if heads % group.size:
        raise ValueError(
            f"`sequence_parallel_size` ({group.size}) must divide the {heads} attention heads of the model:"
            f" choose one of {[size for size in range(2, heads + 1) if heads % size == 0]}."
        )
    implementation = model.config._attn_implementation
    if not implementation.endswith(OVER_RANKS):
        model.set_attn_implementation(_register(implementation))
    model.sequence_group = group
    try:
        _prove(model, group)
    except BaseException:
        model.sequence_group = ALONE
        raise


@contextmanager
def shared_rows(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None, stretches: Stretches | None
) -> Iterator[dict[str, Any]]:
    """Inputs of this rank for a forward of the decoder inside the context.

    Args:
        model: A model whose rows are shared.
        input_ids: Whole rows, [B, S] int64.
        position_ids: Positions of whole rows, [B, S] int64; 0 to S - 1 if None.
        stretches: Where documents lie in the whole rows that must not see each other.
    """
    group, length = sequence_group(model), input_ids.shape[1]
    if position_ids is None:
        position_ids = torch.arange(length, device=input_ids.device)[None]
    whole = group.share_of(length) * group.size
    if stretches is not None and whole != length:
        stretches = _lengthened(stretches, length, whole)
    token = _sharing.set(True)
    try:
        with _whole_rows_chosen_by(model.get_decoder().rotary_emb, position_ids):
            yield {
                "input_ids": group.cut(input_ids),
                "position_ids": group.cut(position_ids),
                "row_group": group,
                "stretches": stretches,
            }
    finally:
        _sharing.reset(token)


def _lengthened(stretches: Stretches, length: int, whole: int) -> Stretches:
    """The bounds in rows that were filled up: the last document of each row takes the filling."""
    bounds = stretches.cu_seq_lens
    row = torch.div(bounds, length, rounding_mode="floor")
    return Stretches((row * whole + bounds % length).int(), stretches.max_length + whole - length)


@contextmanager
def _whole_rows_chosen_by(rotary: nn.Module, position_ids: Tensor) -> Iterator[None]:
    """Lets a rotary module see the last position of the whole rows: on it depends which of its tables it takes."""
    last = position_ids.amax(-1, keepdim=True)

    def extend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": torch.cat([kwargs["position_ids"], last], dim=-1)}
        return (args[0], torch.cat([args[1], last], dim=-1), *args[2:]), kwargs

    def trim(module: nn.Module, args: Any, output: Any) -> Any:
        return tree_map(lambda table: table[..., :-1, :], output)

    hooks = rotary.register_forward_pre_hook(extend, with_kwargs=True), rotary.register_forward_hook(trim)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _register(implementation: str) -> str:
    """Makes an attention over shared rows known to transformers; its name."""
    base = implementation.removesuffix("_by_document")
    if base in ("sdpa", "eager"):
        inner, mask_of = attention_by_document(base), mask_by_document(base)
    elif base.startswith("flash_attention"):
        inner, mask_of = _flash(base), ALL_MASK_ATTENTION_FUNCTIONS[base]
    else:
        raise ValueError(
            "Sequence parallelism needs `attn_implementation` sdpa, eager or flash_attention_2,"
            f" got {implementation!r}."
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        group = options.pop("row_group", None)
        if group is None:
            return inner(module, query, key, value, mask, **options)
        options.pop("position_ids", None)  # those of the share
        if base != "eager":
            query, key, value = in_computing_type(query, key, value)
        if options["stretches"] is None and (base == "eager" or options.get("sliding_window")):
            options["stretches"] = _rows(len(query), query.shape[2] * group.size, query.device)
        return _over_ranks(inner, group, module, query, key, value, options)

    def mask(*arguments: Any, **options: Any) -> Any:
        return None if _sharing.get() else mask_of(*arguments, **options)

    # transformers takes every name with "flash" in it for one of its own
    name = base.replace("flash_attention_", "fa") + OVER_RANKS
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


def _rows(rows: int, length: int, device: torch.device) -> Stretches:
    """Rows of one document each."""
    return Stretches(torch.arange(rows + 1, device=device, dtype=torch.int32) * length, length)


def _flash(implementation: str) -> Attention:
    """FlashAttention of transformers, which looks up its own name in the config, with the bounds of documents."""
    known = ALL_ATTENTION_FUNCTIONS[implementation]

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        stretches = options.pop("stretches", None)
        if stretches is not None:
            options |= flash_keywords(stretches)
        config, name = module.config, module.config._attn_implementation
        config._attn_implementation_internal = implementation
        try:
            return known(module, query, key, value, mask, **options)
        finally:
            config._attn_implementation_internal = name

    return attention


def _over_ranks(
    inner: Attention,
    group: SequenceGroup,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention of this rank's tokens, [B, S / P, H, D], from queries [B, H, S / P, D] and keys and values of K heads.

    Key heads that P does not divide are repeated until it does.
    """
    heads, key_heads = query.shape[1], math.lcm(key.shape[1], group.size)
    key, value = (part.repeat_interleave(key_heads // part.shape[1], dim=1) for part in (key, value))
    query, key, value = (_to_heads(part, group) for part in (query, key, value))
    with readers_of_a_key(module, heads // key_heads):
        output, _ = inner(module, query, key, value, None, **options)
    return _to_tokens(output, group), None


def _to_heads(part: Tensor, group: SequenceGroup) -> Tensor:
    """All tokens of some heads, [B, H / P, S, D], from some tokens of all heads, [B, H, S / P, D]."""
    rows, heads, tokens, size = part.shape
    by_rank = part.reshape(rows, group.size, heads // group.size, tokens, size).transpose(0, 1)
    exchanged = _exchange(by_rank, group)
    return exchanged.permute(1, 2, 0, 3, 4).reshape(rows, heads // group.size, group.size * tokens, size)


def _to_tokens(part: Tensor, group: SequenceGroup) -> Tensor:
    """Some tokens of all heads, [B, S / P, H, D], from all tokens of some heads, [B, S, H / P, D]."""
    rows, tokens, heads, size = part.shape
    by_rank = part.reshape(rows, group.size, tokens // group.size, heads, size).transpose(0, 1)
    exchanged = _exchange(by_rank, group)
    return exchanged.permute(1, 2, 0, 3, 4).reshape(rows, tokens // group.size, group.size * heads, size)


def _exchange(by_rank: Tensor, group: SequenceGroup) -> Tensor:
    """Sends entry ``p`` of [P, ...] to rank ``p`` of the group; entry ``p`` of what returns has come from it."""
    return cast("Tensor", _Exchange.apply(by_rank, group.group))


class _Exchange(torch.autograd.Function):
    """All-to-all, whose gradient is an all-to-all."""

    @staticmethod
    def forward(ctx: Any, by_rank: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        sent = _real(by_rank).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received.to(by_rank.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradients[0], ctx.group), None


class _Join(torch.autograd.Function):
    """All-gather along the tokens; its gradient is this rank's part, for all the ranks that compute the same loss."""

    @staticmethod
    def forward(ctx: Any, shares: Tensor, group: SequenceGroup, length: int) -> Tensor:
        ctx.group = group
        own = _real(shares).contiguous()
        parts = [torch.empty_like(own) for _ in range(group.size)]
        dist.all_gather(parts, own, group=group.group)
        return torch.cat(parts, dim=1)[:, :length].to(shares.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        group, length = ctx.group, gradients[0].shape[1]
        share = group.share_of(length)
        own = gradients[0][:, group.rank * share : (group.rank + 1) * share] * group.size
        filling = torch.zeros_like(own[:, :1]).expand(-1, share - own.shape[1], *own.shape[2:])
        return torch.cat([own, filling], dim=1), None, None


def _real(tensor: Tensor) -> Tensor:
    """Zeros in place of a tensor without data (see ``out_of_memory``): the other ranks wait for this one's part."""
    if not tensor.is_meta:
        return tensor
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)


@torch.no_grad()
def _prove(model: PreTrainedModel, group: SequenceGroup) -> None:
    """Checks that rows give the same hidden states shared and whole.

    Raises:
        RuntimeError: If they do not.
    """
    weight = model.get_input_embeddings().weight
    if weight.is_meta:
        return
    length, vocabulary = 4 * group.size - 1, getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO stage 3 empties it
    tokens = (torch.arange(2 * length, device=weight.device).view(2, length) * 7919 + 1) % vocabulary
    with probing(model) as coarse, torch.compiler.set_stance("force_eager"):
        whole = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        with shared_rows(model, tokens, None, None) as inputs:
            share = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    error = (group.join(share, length) - whole).abs().max() / whole.abs().max()
    if not error < (0.05 if coarse else 1e-3):
        raise RuntimeError(
            f"{type(model).__name__} gives other hidden states when {group.size} ranks share a row (off by"
            f" {error:.1e} of the largest): it mixes tokens outside of its attention, or its attention cannot be"
            " shared. Use it with `sequence_parallel_size: 1`."
        )
