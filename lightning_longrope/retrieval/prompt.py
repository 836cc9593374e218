"""What all prompts are made of: pieces of text as tokens, cut and joined to an exact length."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """One trial: the text, the question and the true answer in one row.

    Attributes:
        tokens: [S] int64, prompt and answer.
        answer: Number of tokens at the end of ``tokens`` that are the answer.
        filler: [S] bool, true on the filler around the needle; None where it is not marked.
        distance: Tokens from the first one of the needle to the first one of the answer.
    """

    tokens: Tensor
    answer: int
    filler: Tensor | None = None
    distance: int = 0


class Pieces:
    """Tokenises the pieces of a prompt, each as it comes after what stands before it.

    Args:
        tokenizer: A Hugging Face tokenizer. Its BOS opens every row where it has one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.bos: list[int] = [] if bos is None else [bos]
        self.eos: list[int] = [] if eos is None else [eos]

    def encode(self, piece: str) -> list[int]:
        """Tokens of a piece that stands alone."""
        return list(self.tokenizer.encode(piece, add_special_tokens=False))

    def encode_after(self, left: str, piece: str) -> list[int]:
        """Tokens of ``piece`` behind ``left``: SentencePiece puts a space in front of a piece that stands alone."""
        return self.encode_all_after(left, [piece])[0]

    def encode_all_after(self, left: str, pieces: Sequence[str]) -> list[list[int]]:
        """Tokens of each piece behind ``left``, in one call of the tokenizer."""
        before = self.encode(left)
        whole = self.tokenizer([left + piece for piece in pieces], add_special_tokens=False)["input_ids"]
        return [
            tokens[len(before) :] if tokens[: len(before)] == before else self.encode(piece)
            for tokens, piece in zip(whole, pieces, strict=True)
        ]

    def check_decodes(self, tokens: Sequence[int], expected: str, what: str) -> None:
        """Fail for a tokenizer that loses letters or digits: every answer would read the same.

        Raises:
            ValueError: If ``tokens`` do not read ``expected``, but for spaces and case.
        """
        actual = self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        if "".join(actual.split()).casefold() != "".join(expected.split()).casefold():
            raise ValueError(f"The tokenizer cannot write the {what}: expected {expected!r}, got {actual!r}.")


def check_place(depth: float, length: int, shortest: int, what: str) -> None:
    """Refuses a depth or length that a prompt cannot have.

    Raises:
        ValueError: If ``depth`` is not in [0, 1] or ``length`` is below ``shortest``.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"`depth` must be in [0, 1], got {depth}.")
    if length < shortest:
        raise ValueError(f"A {what} with this tokenizer needs at least {shortest} tokens, got length {length}.")


def check_text(text: Tensor | None, what: str) -> None:
    """Refuses anything but one row of tokens to cut filler from.

    Raises:
        ValueError: If ``text`` is not a 1-D tensor with tokens in it.
    """
    if text is None or text.ndim != 1 or not len(text):
        got = "None" if text is None else f"shape {tuple(text.shape)}"
        raise ValueError(f"{what} needs `text`, a 1-D tensor of tokens to cut from, got {got}.")


def cut_text(text: Tensor, sizes: Sequence[int], rng: random.Random) -> list[Tensor]:
    """Slices of a text at a random place, each going on where the one before it stopped.

    Args:
        text: [N] tokens.
        sizes: Tokens of each slice.
        rng: Chooses the place.

    Raises:
        ValueError: If the text is too short.
    """
    total = sum(sizes)
    if total > len(text):
        raise ValueError(f"`text` holds {len(text)} tokens, this length needs {total}: give more text.")
    start = rng.randint(0, len(text) - total)
    return list(text[start : start + total].split(list(sizes)))


def join(parts: Sequence[Sequence[int] | Tensor]) -> Tensor:
    """The parts one after another, [S] int64."""
    return torch.cat([torch.as_tensor(part, dtype=torch.int64) for part in parts])
