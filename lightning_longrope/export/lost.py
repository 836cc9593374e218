"""What Hugging Face's rope type ``longrope`` cannot say of a model's tables, and what that costs on a text.

It has two tables, one within the pretrained window and one beyond, one attention factor for both, and no start tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from lightning_longrope.attention import probing
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.model import candidate_rows
from lightning_longrope.scoring import token_nll
from lightning_longrope.tables import LengthTables


@dataclass(frozen=True)
class Loss:
    """What is lost for sequences of some lengths."""

    length: int
    """The longest of them in tokens."""
    what: str
    """What is not kept, in words."""
    tokens: int = 0
    """Tokens of the text that the perplexities are of; 0 without a text."""
    before: float = math.nan
    """Perplexity with the table of the model."""
    after: float = math.nan
    """Perplexity with the table that takes its place."""

    def __str__(self) -> str:
        cost = (
            ""
            if not self.tokens
            else (f" (perplexity on {self.tokens} tokens goes from {self.before:.4g} to {self.after:.4g})")
        )
        return f"up to {self.length} tokens: {self.what}{cost}"


def plain_tables(tables: LengthTables) -> LengthTables:
    """The tables that Hugging Face can choose from, closest to those of a model."""
    longest = replace(tables.longest, start_tokens=0)
    window = longest.original_length
    short = replace(
        tables.for_length(window),
        original_length=window,
        target_length=window,
        start_tokens=0,
        attention_factor=longest.attention_factor,
    )
    if short.values == longest.values or window == longest.target_length:
        return LengthTables((longest,))
    return LengthTables((short, longest))


def what_is_lost(
    model: PreTrainedModel | None, tables: LengthTables, plain: LengthTables, example: Tensor | None = None
) -> list[Loss]:
    """What ``plain`` does not keep of ``tables``, by length.

    Args:
        model: The model, left as it is; None where nothing is measured.
        tables: Its tables.
        plain: Those that take their place.
        example: Tokens of a text to measure on, [S] int64; without it nothing is.

    Raises:
        ValueError: If the example is no row of at least 2 tokens.
    """
    if example is not None and (example.ndim != 1 or len(example) < 2):
        raise ValueError(f"`example` must hold at least 2 tokens in one dimension, got shape {tuple(example.shape)}.")
    losses = []
    for length in tables.lengths:
        own, other = tables.for_length(length), plain.for_length(length)
        if what := ", ".join(_differences(own, other)):
            loss = Loss(length, what)
            if model is not None and example is not None:
                text = example[:length]
                before, after = (_perplexity(model, table, text) for table in (own, other))
                loss = Loss(length, what, len(text), before, after)
            losses.append(loss)
    return losses


def _differences(own: RescaleFactors, other: RescaleFactors) -> Iterator[str]:
    """In what a table that takes the place of another differs."""
    if own.values != other.values:
        yield f"the table for {other.target_length} tokens in place of their own"
    if own.start_tokens:
        yield f"no start tokens (start_tokens={own.start_tokens})"
    if own.attention_factor != other.attention_factor:
        yield f"attention factor {other.attention_factor:.6g} in place of {own.attention_factor:.6g}"


def _perplexity(model: PreTrainedModel, table: RescaleFactors, tokens: Tensor) -> float:
    """Perplexity of a text under one table."""
    with probing(model), candidate_rows(model, [table]):
        nll = token_nll(model, tokens[None].to(model.get_input_embeddings().weight.device))
    return math.exp(nll.double().mean().item())
