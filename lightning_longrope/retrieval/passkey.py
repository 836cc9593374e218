"""Passkey prompts: a five-digit key hidden in a long text, and the question for it at the end.

::

    prompt   BOS  preamble  filler . . . . .  NEEDLE  filler . . . . .  question  KEY          filler "appendix"
             BOS            text . . . . . .  NEEDLE  text . . . . . .  question  KEY          filler "text"
    row      BOS  (text  NEEDLE  text  question  KEY) (text  NEEDLE  text  question  KEY) EOS  two questions

Source: LongRoPE, arXiv:2402.13753, appendix A.1; Mohtashami and Jaggi, arXiv:2305.16300.
"""

import math
import random
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_longrope.retrieval.prompt import Pieces, Prompt, check_place, check_text, cut_text, join

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
        if filler == "text":
            check_text(text, '`filler="text"`')
        self._pieces = Pieces(tokenizer)
        self.filler = filler
        self.text = text if filler == "text" else None
        self.seed = seed
        self._keys: dict[int, list[int]] = {}
        self._tokenise()

    def _tokenise(self) -> None:
        """Tokenise every fixed piece once, each as it comes after what stands before it."""
        after = self._pieces.encode_after
        self._opening = self._pieces.bos + (self._pieces.encode(PREAMBLE) if self.filler == "appendix" else [])
        lefts = ("x", "0", "0")  # a letter before the needle's newline, a digit of the key before the rest
        self._needle = [after(left, piece) for left, piece in zip(lefts, NEEDLE, strict=True)]
        self._question = after("x", QUESTION)
        self._newline = after("0", "\n")
        first, again = after("x\n", GRASS), after(GRASS, " " + GRASS)
        self._grass = torch.tensor(first), torch.tensor(again)
        self._check_decodes(first + again)

    def _check_decodes(self, grass: list[int]) -> None:
        key = 17865
        preamble = self._opening[len(self._pieces.bos) :]
        tokens = [*preamble, *grass, *self._needle_line(key), *self._question, *self._key(key)]
        words = f"{GRASS} {GRASS}{NEEDLE[0]} {key}{NEEDLE[1]} {key}{NEEDLE[2]}{QUESTION} {key}"
        self._pieces.check_decodes(tokens, (PREAMBLE if preamble else "") + words, "passkey prompt")

    def _key(self, key: int) -> list[int]:
        """Tokens of the key, with its space, as they follow the question."""
        if key not in self._keys:
            self._keys[key] = self._pieces.encode_after(QUESTION.strip(), f" {key}")
        return self._keys[key]

    def _needle_line(self, key: int) -> list[int]:
        head, middle, tail = self._needle
        return [*head, *self._key(key), *middle, *self._key(key), *tail]

    @cached_property
    def _key_tokens(self) -> int:
        """Tokens of the longest key; looks at 1,000 of the 90,000, since real tokenizers merge digits."""
        keys = [f" {key}" for key in range(LOWEST_KEY, HIGHEST_KEY + 1, 90)]
        return max(map(len, self._pieces.encode_all_after(QUESTION.strip(), keys)))

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt: no filler at all, and a key of the most tokens."""
        needle = sum(map(len, self._needle)) + 2 * self._key_tokens
        return len(self._opening) + needle + len(self._question) + self._key_tokens

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
        rng = random.Random(f"{self.seed}/{length}/{float(depth)}/{trial}")
        key = rng.randint(LOWEST_KEY, HIGHEST_KEY)
        opening, needle, answer = self._opening, self._needle_line(key), self._key(key)
        used = len(opening) + len(needle) + len(self._question) + len(answer)
        check_place(depth, length, max(used, self.shortest), f"passkey prompt with filler={self.filler!r}")
        before = round(depth * (length - used))
        first, second = self._fill([before, length - used - before], rng)
        tokens = join([opening, first, needle, second, self._question, answer])
        filler = torch.zeros(length, dtype=torch.bool)
        for start, part in ((len(opening), first), (len(opening) + before + len(needle), second)):
            filler[start : start + len(part)] = True
        return Prompt(tokens, len(answer), filler, length - len(answer) - len(opening) - before)

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
        fixed = [(self._needle_line(key), self._question, self._key(key), self._newline) for key in keys]
        fixed[-1] = (*fixed[-1][:3], self._pieces.eos)
        used = len(self._opening) + sum(len(piece) for section in fixed for piece in section)
        if length < used:
            raise ValueError(
                f"A passkey row of {questions} question(s) with filler={self.filler!r} and this tokenizer needs at"
                f" least {used} tokens, got length {length}."
            )
        fillers = self._fill(_random_sizes(length - used, questions, rng), rng)
        parts: list[list[int] | Tensor] = [self._opening]
        mask = torch.zeros(length, dtype=torch.bool)
        end = len(self._opening)
        for section, before, after in zip(fixed, fillers[::2], fillers[1::2], strict=True):
            needle, question, key_tokens, closing = section
            parts += [before, needle, after, question, key_tokens, closing]
            end += sum(map(len, parts[-6:]))
            mask[end - len(closing) - len(key_tokens) : end - len(closing)] = True
        return join(parts), mask

    def _fill(self, sizes: Sequence[int], rng: random.Random) -> list[Tensor]:
        """Filler of each size: the grass starts anew each time, ordinary text goes on where it stopped."""
        if self.text is None:
            first, again = self._grass
            grass = torch.cat([first, again.repeat(math.ceil(max(sizes) / len(again)))])
            return [grass[:size] for size in sizes]
        return cut_text(self.text, sizes, rng)


def _random_sizes(spare: int, sections: int, rng: random.Random) -> list[int]:
    """Cut ``spare`` tokens into ``sections`` random shares and each share in two at a random depth."""
    cuts = [0, *sorted(rng.randint(0, spare) for _ in range(sections - 1)), spare]
    sizes = []
    for start, stop in pairwise(cuts):
        before = rng.randint(0, stop - start)
        sizes += [before, stop - start - before]
    return sizes
