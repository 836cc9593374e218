"""What a search minimises, and the rows of text it is measured on.

Shapes: S tokens of a row, A answer tokens. Losses are in nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_longrope.retrieval import PasskeyPrompts

ObjectiveName = Literal["mixed", "needle", "perplexity"]


@dataclass(frozen=True)
class SearchDocument:
    """One row the search is judged on.

    Attributes:
        tokens: [S] int64.
        answer: Number of tokens at the end that answer a question about the text; 0 for plain text.
        text: Weight of each token as text, [S] bool or float; all but the answer by default. A needle and its
            question have none: predicting the second mention of a key is retrieval too.
    """

    tokens: Tensor
    answer: int = 0
    text: Tensor | None = None

    @property
    def counted(self) -> Tensor:
        """How much predicting token ``t + 1`` counts as text, [S - 1] float64."""
        text = torch.arange(len(self.tokens)) < len(self.tokens) - self.answer if self.text is None else self.text
        return text[1:].double()


class Objective:
    """A weighted sum of the mean nll of text and the mean nll of answers to questions about the text.

    Both come from one forward pass. With a weight on answers a pass key is hidden in each document and asked for at
    its end. A subclass may write other documents (``documents``) or weigh the two means otherwise (``value``); what
    its ``__init__`` was given it keeps in public attributes, which a resume compares.

    Args:
        text: Weight of the mean nll of text tokens.
        answer: Weight of the mean nll of answer tokens.
        text_from: Share of the window before which text does not count; 0.5 counts its last half only.
        end_weight: Weight of a text token in the last eighth of the window; the others have 1. Above 1 it keeps a
            table from winning early in the window what it loses at the end, where few tokens say so.
        needle_depths: First and last depth of the pass keys, in [0, 1]; they are spread evenly over the documents.
            (0, 0) hides them at the start of the text, as LongRoPE2 does.

    Raises:
        ValueError: If a number is out of range, or both weights are 0.

    Source: LongRoPE, arXiv:2402.13753, Eq. 2 (text); LongRoPE2, arXiv:2502.20082, Section 3.2 (answers).
    """

    def __init__(
        self,
        text: float = 1.0,
        answer: float = 0.3,
        text_from: float = 0.0,
        end_weight: float = 3.0,
        needle_depths: tuple[float, float] = (0.0, 0.5),
    ) -> None:
        if not (min(text, answer) >= 0 and 0 < text + answer < math.inf):
            raise ValueError(f"`text` and `answer` must not be negative nor both 0, got {text} and {answer}.")
        if not 0 <= text_from < 1:
            raise ValueError(f"`text_from` is a share of the window, from 0 to below 1, got {text_from}.")
        if not 0 < end_weight < math.inf:
            raise ValueError(f"`end_weight` must be positive and finite, got {end_weight}.")
        low, high = needle_depths
        if not 0 <= low <= high <= 1:
            raise ValueError(f"`needle_depths` must rise within [0, 1], got {tuple(needle_depths)}.")
        self.text = text
        self.answer = answer
        self.text_from = text_from
        self.end_weight = end_weight
        self.needle_depths = (low, high)

    @property
    def needs_tokenizer(self) -> bool:
        """Whether ``documents`` writes questions, for which it needs the model's tokenizer."""
        return self.answer != 0

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides a score, as plain values."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"class": type(self).__name__, **own}

    def documents(
        self, texts: Sequence[Tensor], length: int, tokenizer: Any = None, seed: int = 0
    ) -> list[SearchDocument]:
        """Rows of exactly ``length`` tokens.

        Args:
            texts: Documents, each a 1-D int64 tensor of at least ``length`` tokens.
            length: S, the target length in tokens.
            tokenizer: Tokenizer of the model, where ``needs_tokenizer``.
            seed: Seed of the keys.
        """
        place = torch.arange(length, dtype=torch.float32) / length  # not in the type of the run, which may be half
        weights = torch.where(place >= 0.875, place.new_tensor(self.end_weight), 1.0) * (place >= self.text_from)
        if not self.answer:
            return [SearchDocument(text[:length], text=weights) for text in texts]
        rows, (low, high) = [], self.needle_depths
        for index, text in enumerate(texts):
            depth = low + (index + 0.5) / len(texts) * (high - low)
            prompt = PasskeyPrompts(tokenizer, filler="text", text=text, seed=seed).prompt(length, depth, index)
            assert prompt.filler is not None, "prompts filled with text know which of their tokens it is"
            rows.append(SearchDocument(prompt.tokens, prompt.answer, prompt.filler * weights))
        return rows

    def value(self, text: float, answer: float) -> float:
        """The score from the two means, lower is better; called for all documents together and for each alone.

        Args:
            text: Mean nll of text tokens.
            answer: Mean nll of answer tokens, NaN without answers.
        """
        parts = [weight * mean for weight, mean in ((self.text, text), (self.answer, answer)) if weight]
        return sum(parts[1:], parts[0])


OBJECTIVES = {
    "mixed": Objective(),
    "needle": Objective(text=0.0, answer=1.0, end_weight=1.0),
    "perplexity": Objective(answer=0.0, end_weight=1.0),
}
"""Objectives that have a name."""


def named_objective(objective: "Objective | ObjectiveName | None", tokenizer: Any) -> Objective:
    """The objective of a name; without one, ``mixed`` where there is a tokenizer and ``perplexity`` where not.

    Raises:
        ValueError: If there is no such name, or the objective needs a tokenizer that is not there.
    """
    objective = objective or ("perplexity" if tokenizer is None else "mixed")
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be {', '.join(OBJECTIVES)} or an Objective, got {objective!r}.")
        objective = OBJECTIVES[objective]
    if objective.needs_tokenizer and tokenizer is None:
        raise ValueError("The objective asks questions and needs a tokenizer; pass one or use 'perplexity'.")
    return objective


def objective_name(objective: Objective) -> str:
    """One word for people: ``mixed``, ``needle`` or ``perplexity``, else the name of the class."""
    if type(objective) is not Objective:
        return type(objective).__name__
    return "perplexity" if not objective.answer else "mixed" if objective.text else "needle"


def search_documents(
    texts: Sequence[Tensor], length: int, objective: Objective, tokenizer: Any = None, seed: int = 0
) -> list[SearchDocument]:
    """The rows of an objective, checked.

    Raises:
        ValueError: If there are no texts, one is no row of tokens or too short, or a row has another length.
    """
    if not texts:
        raise ValueError("The search needs at least one document, got none.")
    for text in texts:
        if not (isinstance(text, Tensor) and text.dtype == torch.int64 and text.ndim == 1):
            kind = f"{text.dtype} {tuple(text.shape)}" if isinstance(text, Tensor) else type(text).__name__
            raise ValueError(f"Search documents are 1-D int64 tensors of tokens, got {kind}.")
    if short := [len(text) for text in texts if len(text) < length]:
        raise ValueError(f"Search documents need at least {length} tokens (the target length), got {short}.")
    rows = objective.documents(texts, length, tokenizer, seed)
    if not rows or any(len(row.tokens) != length for row in rows):
        got = [len(row.tokens) for row in rows]
        raise ValueError(f"{type(objective).__name__}.documents must give rows of {length} tokens, got {got}.")
    return rows
