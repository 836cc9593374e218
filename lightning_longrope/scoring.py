"""The one way a (candidate, document) pair becomes a number, on one device or many.

A forward pass holds rows of one length; rows may carry different candidates (see ``model.candidate_rows``), so
short documents share passes. Which rows share a pass never depends on the number of ranks, so a search gives the
same numbers bit for bit on 1, 2 or 4 processes.

Shapes: B rows, S tokens of a row, H hidden size, A answer tokens. Losses are in nats.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_longrope.factors import RescaleFactors
from lightning_longrope.losses import token_nll as flat_token_nll
from lightning_longrope.model import candidate_rows, hidden_states, output_head
from lightning_longrope.retrieval import PasskeyPrompts

Objective = Literal["perplexity", "needle", "mixed"]


@torch.no_grad()
def token_nll(model: Any, input_ids: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first, given the tokens before it.

    Never holds the logits of a long row. Dropout is off if the caller has set ``model.eval()``.

    Args:
        model: A Hugging Face causal language model.
        input_ids: Tokens, [B, S] int64, on the device of the model. No padding.

    Returns:
        [B, S - 1] float32 in nats; entry ``t`` belongs to token ``t + 1``.
    """
    hidden = _hidden(model, input_ids)[:, :-1]
    flat = flat_token_nll(hidden.reshape(-1, hidden.shape[-1]), output_head(model), input_ids[:, 1:].reshape(-1))
    return flat.view(input_ids.shape[0], -1)


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
    hidden = _hidden(model, input_ids)[:, -answer - 1 : -1]
    return output_head(model)(hidden).argmax(-1) == input_ids[:, -answer:]


def _hidden(model: Any, input_ids: Tensor) -> Tensor:
    # Evaluation sees many shapes: compiled layers would be compiled again for each.
    with torch.compiler.set_stance("force_eager"):
        return hidden_states(model, input_ids)


@dataclass(frozen=True)
class SearchDocument:
    """One row the search is judged on.

    Attributes:
        tokens: [S] int64.
        answer: Number of tokens at the end that answer a question about the text; 0 for plain text.
        text: [S] bool, true on the tokens that count as text; all but the answer by default. A needle and its
            question do not: predicting the second mention of a key is retrieval too.
    """

    tokens: Tensor
    answer: int = 0
    text: Tensor | None = None

    @property
    def counted(self) -> Tensor:
        """[S - 1] bool: whether predicting token ``t + 1`` counts as text."""
        text = torch.arange(len(self.tokens)) < len(self.tokens) - self.answer if self.text is None else self.text
        return text[1:]


@dataclass(frozen=True)
class Score:
    """What a candidate scored; lower is better.

    Attributes:
        value: The objective in nats per token; ``mixed`` adds the means over text and over answers.
        text: Mean nll of the text tokens.
        answer: Mean nll of the answer tokens, NaN without answers.
    """

    value: float
    text: float
    answer: float


class Workers(Protocol):
    """The processes that share a search."""

    rank: int
    world_size: int

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a float64 tensor over all ranks, the same on each of them."""


class SingleWorker:
    """One process, nothing to exchange."""

    rank = 0
    world_size = 1

    def sum(self, values: Tensor) -> Tensor:
        """Returns ``values`` as they are."""
        return values


def search_documents(
    texts: Sequence[Tensor], length: int, objective: Objective, tokenizer: Any = None, seed: int = 0
) -> list[SearchDocument]:
    """Rows of exactly ``length`` tokens for an objective.

    For ``needle`` and ``mixed`` a pass key is hidden in the first half of each text, at depths spread evenly over the
    documents, and asked for at the end: at distances that are new to the model. The text is cut so that the row keeps
    its length.

    Args:
        texts: Documents, each a 1-D int64 tensor of at least ``length`` tokens.
        length: S, the target length in tokens.
        objective: What the search minimises.
        tokenizer: Tokenizer of the model, needed for ``needle`` and ``mixed``.
        seed: Seed of the keys.

    Raises:
        ValueError: If there are no texts, one is too short, or an objective needs a tokenizer that is not there.
    """
    if not texts:
        raise ValueError("The search needs at least one document, got none.")
    short = [len(text) for text in texts if len(text) < length]
    if short:
        raise ValueError(f"Search documents need at least {length} tokens (the target length), got {short}.")
    if objective == "perplexity":
        return [SearchDocument(text[:length]) for text in texts]
    if tokenizer is None:
        raise ValueError(
            f"The objective {objective!r} asks questions and needs a tokenizer; pass one or use 'perplexity'."
        )
    documents = []
    for index, text in enumerate(texts):
        prompts = PasskeyPrompts(tokenizer, filler="text", text=text, seed=seed)
        prompt = prompts.prompt(length, (index + 0.5) / len(texts) / 2, index)
        documents.append(SearchDocument(prompt.tokens, prompt.answer, prompt.filler))
    return documents


def score_candidates(
    model: Any,
    candidates: Sequence[RescaleFactors],
    documents: Sequence[SearchDocument],
    objective: Objective,
    *,
    batch_tokens: int = 16384,
    workers: Workers | None = None,
) -> list[Score]:
    """Scores of candidates, each the mean over all documents' tokens.

    Every rank plans the same forward passes, runs its share and as many as the others (collective operations
    inside a forward need that), and gets all scores back.

    Args:
        model: A Hugging Face causal language model in eval mode.
        candidates: Tables to score.
        documents: Rows to score them on.
        objective: What ``Score.value`` is.
        batch_tokens: Tokens of a forward pass; rows longer than that go alone.
        workers: The processes that share the work; one where it is not given.

    Returns:
        One score per candidate. A candidate that overflows scores NaN.
    """
    workers = workers or SingleWorker()
    passes = list(_plan(candidates, documents, batch_tokens))
    sums = torch.zeros(len(candidates), len(documents), 4, dtype=torch.float64)  # text nll, tokens, answer nll, tokens
    rounds = -(-len(passes) // workers.world_size)
    for turn in range(rounds):
        index = turn * workers.world_size + workers.rank
        rows = passes[min(index, len(passes) - 1)]  # beyond the last pass: dummy work, thrown away
        found = _row_sums(model, [candidates[c] for c, _ in rows], [documents[d] for _, d in rows])
        if index < len(passes):
            for (candidate, document), values in zip(rows, found, strict=True):
                sums[candidate, document] = values
    return [_score(row, objective) for row in workers.sum(sums).sum(1).tolist()]


def _plan(
    candidates: Sequence[RescaleFactors], documents: Sequence[SearchDocument], batch_tokens: int
) -> Iterator[list[tuple[int, int]]]:
    """Passes as lists of (candidate, document) indices; rows of a pass have one length and answer size."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, document in enumerate(documents):
        shapes.setdefault((len(document.tokens), document.answer), []).append(index)
    for (length, _), members in shapes.items():
        rows = [(candidate, document) for candidate in range(len(candidates)) for document in members]
        size = max(1, batch_tokens // length)
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _row_sums(model: Any, factors: list[RescaleFactors], documents: list[SearchDocument]) -> Tensor:
    """Text nll, text tokens, answer nll and answer tokens of every row, [B, 4] float64 on the CPU."""
    answer = documents[0].answer
    input_ids = torch.stack([document.tokens for document in documents]).to(model.device)
    with candidate_rows(model, factors):
        nll = token_nll(model, input_ids).double().cpu()
    counted = torch.stack([document.counted for document in documents])
    answers = torch.arange(nll.shape[1]) >= nll.shape[1] - answer
    # where() and not a product: a NaN outside of a mask must not reach its sum
    sums = [torch.where(mask, nll, 0.0).sum(1) for mask in (counted, answers)]
    counts = [mask.expand_as(nll).sum(1).double() for mask in (counted, answers)]
    return torch.stack([sums[0], counts[0], sums[1], counts[1]], dim=1)


def _score(sums: list[float], objective: Objective) -> Score:
    text_nll, text_tokens, answer_nll, answer_tokens = sums
    text = text_nll / text_tokens
    answer = answer_nll / answer_tokens if answer_tokens else float("nan")
    return Score({"perplexity": text, "needle": answer, "mixed": text + answer}[objective], text, answer)
