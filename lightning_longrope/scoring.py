"""The one way a (candidate, document) pair becomes a number; ``evaluating`` spreads many over the ranks.

Shapes: B rows, S tokens of a row, D documents, H hidden size, A answer tokens. Losses are in nats.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_longrope.factors import RescaleFactors
from lightning_longrope.losses import token_nll as flat_token_nll
from lightning_longrope.model import candidate_rows, hidden_states, output_head, table_of_length
from lightning_longrope.objectives import Objective, SearchDocument
from lightning_longrope.onednn import fast_linear
from lightning_longrope.sequence_parallel import sequence_group

Status = Literal["ok", "partial", "nan", "inf", "oom", "dropped"]

LOGITS_AT_A_TIME = {"cpu": 1 << 22, "cuda": 1 << 25}
"""Most logits that exist at a time, whatever the vocabulary: 16 MiB in float32 on a CPU, 128 MiB on a GPU."""

POSITIONS_AT_A_TIME = {"cpu": 1 << 10, "cuda": 1 << 12}
"""Most positions whose logits exist at a time, however small the vocabulary."""

PASS_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 14}
"""Tokens of a forward pass where nothing is said: more would leave the caches of a CPU, and take memory."""


def pass_tokens(device: torch.device) -> int:
    """``PASS_TOKENS`` of a device."""
    return PASS_TOKENS.get(device.type, PASS_TOKENS["cuda"])


@torch.no_grad()
def token_nll(model: Any, input_ids: Tensor, last: int | None = None) -> Tensor:
    """Negative log-likelihood of every token but the first, given the tokens before it.

    Never holds the logits of a long row. Dropout is off if the caller has set ``model.eval()``.

    Args:
        model: A Hugging Face causal language model.
        input_ids: Tokens, [B, S] int64, on the device of the model. No padding, but at the end of rows, which no token
            before it sees; with tables by length none at all, since the longest row chooses the table of a padded one.
        last: Only that many tokens at the end of each row go through the output head; all S - 1 if None.

    Returns:
        [B, S - 1] (or [B, last]) float32 in nats; without ``last``, entry ``t`` belongs to token ``t + 1``.
    """
    rows, length = input_ids.shape
    hidden, group = _hidden(model, input_ids), sequence_group(model)
    if last is not None:
        states = _states(model, hidden, rows, range(length - 1 - last, length - 1))
        return _flat_nll(model, states, input_ids[:, -last:].flatten()).view(rows, last)
    labels = group.cut(pad(input_ids[:, 1:], (0, 1), value=-100), filling=-100)
    nll = _flat_nll(model, hidden.flatten(0, 1), labels.flatten()).view(labels.shape)
    return group.join(nll, length)[:, :-1]


@torch.no_grad()
def greedy_matches(model: Any, input_ids: Tensor, answer: int) -> Tensor:
    """Whether greedy decoding would give each of the last ``answer`` tokens, found in one forward pass.

    The true prefix is fed ("teacher forcing"): greedy decoding repeats the whole answer exactly when the most
    likely token is right at every answer position, so nothing is generated and no cache is kept.

    Args:
        model: A Hugging Face causal language model.
        input_ids: Prompt and answer, [B, S] int64. No padding.
        answer: A, the number of answer tokens at the end of each row.

    Returns:
        [B, A] bool.
    """
    rows, length = input_ids.shape
    states = _states(model, _hidden(model, input_ids), rows, range(length - 1 - answer, length - 1))
    head = _head(model)
    likeliest = torch.cat([head(part).argmax(-1) for part in states.split(_positions_at_a_time(model))])
    return likeliest.view(-1, answer) == input_ids[:, -answer:]


@torch.no_grad()
def continuation_scores(
    model: Any, rows: Sequence[Sequence[int]], continuations: Sequence[tuple[int, Sequence[int]]]
) -> tuple[Tensor, Tensor]:
    """Nll of texts after a beginning, and whether greedy decoding would give them, in one forward pass.

    Rows of different lengths share the pass: they are padded at the end, where no token sees the padding. A model with
    tables by length reads padded rows with the table of the longest, so rows must be of lengths that share one. Only
    positions that predict go through the output head.

    Args:
        model: A Hugging Face causal language model.
        rows: Each the tokens of a beginning and of its continuation but for the last token.
        continuations: The row each belongs to, and its tokens; many may share a row.

    Returns:
        The nll of each continuation in nats, [N] float64, and whether all its tokens are the likeliest, [N] bool.

    Raises:
        ValueError: If the model reads rows of such lengths with several tables.
    """
    if len({table_of_length(model, len(row)) for row in rows}) > 1:
        lengths = sorted({len(row) for row in rows})
        raise ValueError(f"Rows of {lengths} tokens are read with several tables: score them in passes of their own.")
    device = next(model.parameters()).device
    padded = [torch.tensor(row, device=device) for row in rows]
    hidden = _hidden(model, torch.nn.utils.rnn.pad_sequence(padded, batch_first=True))
    places = [(row, place) for row, tokens in continuations for place in range(-len(tokens), 0)]
    of, back = torch.tensor(places, dtype=torch.int64, device=device).view(-1, 2).T
    ends = torch.tensor([len(row) for row in rows], device=device)
    states = sequence_group(model).take(hidden, of, ends[of] + back)
    labels = torch.cat([torch.tensor(tokens, device=device) for _, tokens in continuations])
    head, size, nll, right = _head(model), _positions_at_a_time(model), [], []
    for part, wanted in zip(states.split(size), labels.split(size), strict=True):
        logits = head(part).float()
        nll.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").cpu().double())
        right.append((logits.argmax(-1) == wanted).cpu())
    lengths = [len(tokens) for _, tokens in continuations]
    sums = [part.sum() for part in torch.cat(nll).split(lengths)]
    return torch.stack(sums), torch.stack([part.all() for part in torch.cat(right).split(lengths)])


def _states(model: Any, hidden: Tensor, rows: int, positions: range) -> Tensor:
    """Hidden states at the same positions of all rows, [B * positions, H]."""
    places = torch.cartesian_prod(torch.arange(rows), torch.tensor(positions)).to(hidden.device)
    return sequence_group(model).take(hidden, *places.T)


def _flat_nll(model: Any, states: Tensor, labels: Tensor) -> Tensor:
    return flat_token_nll(states, _head(model), labels, chunk=_positions_at_a_time(model))


def _positions_at_a_time(model: Any) -> int:
    """Positions that go through the output head together."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 1)
    device = next(model.parameters()).device.type
    kind = device if device in LOGITS_AT_A_TIME else "cuda"
    return max(1, min(POSITIONS_AT_A_TIME[kind], LOGITS_AT_A_TIME[kind] // vocabulary))


@cache
def _keep_freed_memory() -> None:
    """Lets the C library keep up to 62 MiB that is freed, where it would hand every pass back page by page.

    Glibc does so by itself once it was given back one piece of this size, the largest it learns from. For searches,
    whose many passes are alike: where shapes change, what is kept is in pieces that do not fit.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def _hidden(model: Any, input_ids: Tensor) -> Tensor:
    # Evaluation sees many shapes: compiled layers would be compiled again for each.
    with torch.compiler.set_stance("force_eager"), fast_linear(input_ids.device):
        return hidden_states(model, input_ids)


def _head(model: Any) -> Callable[[Tensor], Tensor]:
    head = output_head(model)

    def logits(states: Tensor) -> Tensor:
        with fast_linear(states.device):
            return head(states)

    return logits


@dataclass(frozen=True)
class Score:
    """What a candidate scored; lower is better.

    Attributes:
        value: The objective in nats per token. Of a dropped candidate it is extrapolated; not finite where it failed.
        text: Mean nll of the text tokens.
        answer: Mean nll of the answer tokens, NaN without answers.
        status: ``ok``; ``partial`` where it was to be judged on part of the documents; ``nan`` or ``inf`` where the
            loss overflowed; ``oom`` where not even one row fitted in memory; ``dropped`` where a race ended early.
        documents: Text nll, text tokens, answer nll and answer tokens of each document; None where it was not scored.
    """

    value: float
    text: float
    answer: float
    status: Status = "ok"
    documents: tuple[tuple[float, float, float, float] | None, ...] = ()


def score_of(sums: Tensor, scored: Tensor, objective: Objective) -> Score:
    """The score over the documents scored so far.

    Args:
        sums: Text nll, text tokens, answer nll and answer tokens of each document, [D, 4] float64.
        scored: Which documents those are, [D] bool.
        objective: Turns the two means into one value.
    """
    rows = tuple(tuple(row) if known else None for row, known in zip(sums.tolist(), scored.tolist(), strict=True))
    if not scored.any():
        return Score(math.nan, math.nan, math.nan, "oom", rows)
    text, answer = means(sums[scored].sum(0))
    value = objective.value(text, answer)
    status: Status = "ok" if math.isfinite(value) else "nan" if math.isnan(value) else "inf"
    return Score(value, text, answer, status, rows)


def means(sums: Tensor) -> tuple[float, float]:
    """Mean nll of text and of answers from their four sums, [4]; NaN where there are no such tokens."""
    text_nll, text_tokens, answer_nll, answer_tokens = sums.tolist()
    text = text_nll / text_tokens if text_tokens else math.nan
    return text, answer_nll / answer_tokens if answer_tokens else math.nan


def document_values(sums: Tensor, objective: Objective) -> list[float]:
    """The objective on each document alone, from their sums, [D, 4]."""
    return [objective.value(*means(row)) for row in sums]


def row_sums(model: Any, factors: Sequence[RescaleFactors], documents: Sequence[SearchDocument]) -> Tensor:
    """Text nll, text tokens, answer nll and answer tokens of rows of one length and answer size, in one forward pass.

    Args:
        model: A Hugging Face causal language model in eval mode.
        factors: Table of each row, B; they may differ.
        documents: Each row's text, B.

    Returns:
        [B, 4] float64 on the CPU.
    """
    answer = documents[0].answer
    input_ids = torch.stack([document.tokens for document in documents]).to(model.device)
    if input_ids.device.type == "cpu":
        _keep_freed_memory()
    with candidate_rows(model, list(factors)):
        nll = token_nll(model, input_ids).double().cpu()
    text = torch.stack([document.counted for document in documents])
    answers = (torch.arange(nll.shape[1]) >= nll.shape[1] - answer).double().expand_as(nll)
    # where() and not the product alone: a NaN without weight must not reach the sum
    sums = [torch.where(weight > 0, weight * nll, 0.0).sum(1) for weight in (text, answers)]
    counts = [weight.sum(1) for weight in (text, answers)]
    return torch.stack([sums[0], counts[0], sums[1], counts[1]], dim=1)
