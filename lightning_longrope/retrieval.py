"""Passkey prompts: a five-digit key hidden in a long text, and the question for it at the end.

Everything is cut by tokens, so a prompt has exactly the length that was asked for, and everything is a pure function of
``(seed, length, depth, trial)``, so every rank and every run sees the same prompts. Nothing here knows a model.

::

    prompt   BOS  preamble  filler . . . . .  NEEDLE  filler . . . . .  question  KEY          filler "appendix"
             BOS            text . . . . . .  NEEDLE  text . . . . . .  question  KEY          filler "text"
    row      BOS  (text  NEEDLE  text  question  KEY) (text  NEEDLE  text  question  KEY) EOS  two questions

Source: LongRoPE, arXiv:2402.13753, appendix A.1; Mohtashami and Jaggi, arXiv:2305.16300.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREAMBLE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them."
    " I will quiz you about the important information there.\n"
)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = ("\nThe pass key is", ". Remember it.", " is the pass key.\n")  # the key goes between, twice
QUESTION = "\nWhat is the pass key? The pass key is"
LOWEST_KEY, HIGHEST_KEY = 10_000, 99_999


@dataclass(frozen=True)
class Prompt:
    """One trial: the text, the question and the true answer in one row.

    Attributes:
        tokens: [S] int64, prompt and answer.
        answer: Number of tokens at the end of ``tokens`` that are the answer.
        filler: [S] bool, true on the filler around the needle.
    """

    tokens: Tensor
    answer: int
    filler: Tensor


class PasskeyPrompts:
    """Writes passkey prompts and training rows of an exact token length.

    Args:
        tokenizer: A Hugging Face tokenizer. Its BOS opens every row where it has one; its EOS ends training rows.
        filler: What surrounds the needle: ``"appendix"`` is the prompt of the paper word for word, ``"text"`` is
            ordinary text and no preamble.
        text: Token stream to cut ordinary text from, [N] of integers; for ``filler="text"`` only.
        seed: Chooses keys and slices of text.

    Raises:
        ValueError: If ``text`` is missing or is not one row of tokens, or if the tokenizer cannot write the prompt.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        filler: Literal["appendix", "text"] = "appendix",
        text: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        if filler not in ("appendix", "text"):
            raise ValueError(f'`filler` must be "appendix" or "text", got {filler!r}.')
        if filler == "text" and (text is None or text.ndim != 1 or not len(text)):
            got = "None" if text is None else f"shape {tuple(text.shape)}"
            raise ValueError(f'`filler="text"` needs `text`, a 1-D tensor of tokens to cut from, got {got}.')
        self.tokenizer = tokenizer
        self.filler = filler
        self.text = text if filler == "text" else None
        self.seed = seed
        self._keys: dict[int, list[int]] = {}
        self._tokenise()

    def _tokenise(self) -> None:
        """Tokenise every fixed piece once, each as it comes after what stands before it."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self._bos: list[int] = [] if bos is None else [bos]
        self._eos: list[int] = [] if eos is None else [eos]
        self._preamble = self._encode(PREAMBLE) if self.filler == "appendix" else []
        lefts = ("x", "0", "0")  # a letter before the needle's newline, a digit of the key before the rest
        self._needle = [self._encode_after(left, piece) for left, piece in zip(lefts, NEEDLE, strict=True)]
        self._question = self._encode_after("x", QUESTION)
        self._newline = self._encode_after("0", "\n")
        first, again = self._encode_after("x\n", GRASS), self._encode_after(GRASS, " " + GRASS)
        self._grass = torch.tensor(first), torch.tensor(again)
        self._check_decodes(first + again)

    def _encode(self, piece: str) -> list[int]:
        return list(self.tokenizer.encode(piece, add_special_tokens=False))

    def _encode_after(self, left: str, piece: str) -> list[int]:
        """Tokens of ``piece`` behind ``left``: SentencePiece puts a space in front of a piece that stands alone."""
        before, both = self._encode(left), self._encode(left + piece)
        return both[len(before) :] if both[: len(before)] == before else self._encode(piece)

    def _check_decodes(self, grass: list[int]) -> None:
        """Fail for a tokenizer that loses letters or digits: every key would read the same."""
        key = 17865
        tokens = [*self._preamble, *grass, *self._needle_line(key), *self._question, *self._key(key)]
        preamble = PREAMBLE if self._preamble else ""
        expected = f"{preamble}{GRASS} {GRASS}{NEEDLE[0]} {key}{NEEDLE[1]} {key}{NEEDLE[2]}{QUESTION} {key}"
        actual = self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        if "".join(actual.split()).casefold() != "".join(expected.split()).casefold():
            raise ValueError(f"The tokenizer cannot write the passkey prompt: expected {expected!r}, got {actual!r}.")

    def _key(self, key: int) -> list[int]:
        """Tokens of the key, with its space, as they follow the question."""
        if key not in self._keys:
            self._keys[key] = self._encode_after(QUESTION.strip(), f" {key}")
        return self._keys[key]

    def _needle_line(self, key: int) -> list[int]:
        head, middle, tail = self._needle
        return [*head, *self._key(key), *middle, *self._key(key), *tail]

    @cached_property
    def _key_tokens(self) -> int:
        """Tokens of the longest key; looks at 1,000 of the 90,000, since real tokenizers merge digits."""
        return max(len(self._key(key)) for key in range(LOWEST_KEY, HIGHEST_KEY + 1, 90))

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt: no filler at all, and a key of the most tokens."""
        needle = sum(map(len, self._needle)) + 2 * self._key_tokens
        return len(self._bos) + len(self._preamble) + needle + len(self._question) + self._key_tokens

    def prompt(self, length: int, depth: float, trial: int) -> Prompt:
        """The prompt of one trial; the same four numbers always give the same tokens.

        Args:
            length: Tokens of the prompt and the answer together.
            depth: Where the needle is: 0 opens the text, 1 stands directly before the question.
            trial: Number of the trial; each has its own key (and slice of text).

        Returns:
            The tokens, [length] int64, how many of them are the answer, and which are filler.

        Raises:
            ValueError: If ``depth`` is not in [0, 1], ``length`` is below ``shortest``, or ``text`` is too short.
        """
        if not 0 <= depth <= 1:
            raise ValueError(f"`depth` must be in [0, 1], got {depth}.")
        rng = random.Random(f"{self.seed}/{length}/{float(depth)}/{trial}")
        key = rng.randint(LOWEST_KEY, HIGHEST_KEY)
        opening, needle, answer = self._bos + self._preamble, self._needle_line(key), self._key(key)
        used = len(opening) + len(needle) + len(self._question) + len(answer)
        if length < max(used, self.shortest):
            raise ValueError(
                f"A passkey prompt with filler={self.filler!r} and this tokenizer needs at least"
                f" {max(used, self.shortest)} tokens, got length {length}."
            )
        before = round(depth * (length - used))
        first, second = self._fill([before, length - used - before], rng)
        tokens = _join([opening, first, needle, second, self._question, answer])
        filler = torch.zeros(length, dtype=torch.bool)
        for start, part in ((len(opening), first), (len(opening) + before + len(needle), second)):
            filler[start : start + len(part)] = True
        return Prompt(tokens, len(answer), filler)

    def row(self, length: int, questions: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        """A training row: sections of random size, each with a fresh key hidden in it and asked for at its end.

        Args:
            length: Tokens of the row.
            questions: Number of sections.
            rng: Source of all choices.

        Returns:
            tokens [length] int64, and a mask [length] bool that is true on the tokens of the key after each question.

        Raises:
            ValueError: If ``length`` is too short for that many questions, or ``text`` is too short.
        """
        if questions < 1:
            raise ValueError(f"A passkey row needs `questions` >= 1, got {questions}.")
        keys = [rng.randint(LOWEST_KEY, HIGHEST_KEY) for _ in range(questions)]
        opening = self._bos + self._preamble
        fixed = [(self._needle_line(key), self._question, self._key(key), self._newline) for key in keys]
        fixed[-1] = (*fixed[-1][:3], self._eos)
        used = len(opening) + sum(len(piece) for section in fixed for piece in section)
        if length < used:
            raise ValueError(
                f"A passkey row of {questions} question(s) with filler={self.filler!r} and this tokenizer needs at"
                f" least {used} tokens, got length {length}."
            )
        fillers = self._fill(_random_sizes(length - used, questions, rng), rng)
        parts: list[list[int] | Tensor] = [opening]
        mask = torch.zeros(length, dtype=torch.bool)
        end = len(opening)
        for section, before, after in zip(fixed, fillers[::2], fillers[1::2], strict=True):
            needle, question, key_tokens, closing = section
            parts += [before, needle, after, question, key_tokens, closing]
            end += sum(map(len, parts[-6:]))
            mask[end - len(closing) - len(key_tokens) : end - len(closing)] = True
        return _join(parts), mask

    def _fill(self, sizes: Sequence[int], rng: random.Random) -> list[Tensor]:
        """Filler of each size: the grass starts anew each time, ordinary text goes on where it stopped."""
        if self.text is None:
            first, again = self._grass
            grass = torch.cat([first, again.repeat(math.ceil(max(sizes) / len(again)))])
            return [grass[:size] for size in sizes]
        total = sum(sizes)
        if total > len(self.text):
            raise ValueError(f"`text` holds {len(self.text)} tokens, this length needs {total}: give more text.")
        start = rng.randint(0, len(self.text) - total)
        return list(self.text[start : start + total].split(list(sizes)))


def _random_sizes(spare: int, sections: int, rng: random.Random) -> list[int]:
    """Cut ``spare`` tokens into ``sections`` random shares and each share in two at a random depth."""
    cuts = [0, *sorted(rng.randint(0, spare) for _ in range(sections - 1)), spare]
    sizes = []
    for start, stop in pairwise(cuts):
        before = rng.randint(0, stop - start)
        sizes += [before, stop - start - before]
    return sizes


def _join(parts: Sequence[list[int] | Tensor]) -> Tensor:
    return torch.cat([torch.as_tensor(part, dtype=torch.int64) for part in parts])


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson score): stays in [0, 1] and has a width at 0 and at 1.

    Args:
        successes: Number of successes.
        trials: Number of trials, at least 1.

    Returns:
        The lower and the upper end, in [0, 1].

    Raises:
        ValueError: If ``successes`` is not in [0, trials] or there is no trial.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"A rate needs 0 <= successes <= trials and a trial, got {successes} of {trials}.")
    z = 1.959963984540054  # 97.5 % point of the normal distribution
    rate, shrink = successes / trials, 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / shrink
    # At the ends the exact value is 0 or 1; rounding must not leave it out of its own interval.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)
