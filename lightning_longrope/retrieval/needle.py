"""Needle prompts: sentences of one's own hidden in ordinary text, and the question for one of them at the end.

::

    prompt   BOS  text . .  needle 2  text . . . . .  NEEDLE 1  text . .  needle 3  text  question 1  ANSWER 1

The needle that is asked for stands at the depth of the trial, the others at random places.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_longrope.retrieval.prompt import Pieces, Prompt, check_place, check_text, cut_text, join

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Needle:
    """A sentence to hide and the question for it.

    Args:
        text: The sentence, which holds the answer.
        question: The question and the beginning of its answer, put at the end of the prompt.
        answer: How the answer goes on, word for word.

    Raises:
        ValueError: If one of them is empty.
    """

    text: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        if not (self.text.strip() and self.question.strip() and self.answer.strip()):
            raise ValueError(f"A needle needs a `text`, a `question` and an `answer`, got {self}.")


SOUP = Needle(
    "The secret spice in the soup that the old innkeeper served on Sundays is smoked paprika.",
    "What is the secret spice in the soup that the old innkeeper served on Sundays? The secret spice is",
    "smoked paprika",
)
BRIDGE = Needle(
    "The stone bridge behind the mill was built by a carpenter named Ottokar.",
    "Who built the stone bridge behind the mill? It was built by a carpenter named",
    "Ottokar",
)


class NeedlePrompts:
    """Writes prompts with needles in ordinary text, of an exact token length.

    Args:
        tokenizer: A Hugging Face tokenizer. Its BOS opens every row where it has one.
        needles: All of them are hidden in every prompt; trials ask for them in turn.
        text: Token stream to cut ordinary text from, [N] of integers.
        seed: Chooses slices of text and the places of needles not asked for.

    Raises:
        ValueError: If there is no needle, ``text`` is not one row of tokens, or the tokenizer cannot write a needle.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", needles: Sequence[Needle], text: Tensor, seed: int = 0
    ) -> None:
        if not needles:
            raise ValueError("`needles` needs at least one needle, got none.")
        check_text(text, "A needle prompt")
        self._pieces = Pieces(tokenizer)
        self.needles = tuple(needles)
        self.text = text
        self.seed = seed
        after = self._pieces.encode_after
        self._hidden = [after("x", f"\n{needle.text.strip()}\n") for needle in needles]
        self._questions = [after("x", f"\n{needle.question.strip()}") for needle in needles]
        self._answers = [after(needle.question.strip(), f" {needle.answer.strip()}") for needle in needles]
        for needle, question, answer in zip(needles, self._questions, self._answers, strict=True):
            self._pieces.check_decodes(question + answer, needle.question + needle.answer, "question of a needle")

    def prompt(self, length: int, depth: float, trial: int) -> Prompt:
        """The prompt of one trial; the same four numbers always give the same tokens.

        Args:
            length: Tokens of the prompt and the answer together.
            depth: Where the needle asked for is: 0 opens the text, 1 stands directly before the question.
            trial: Number of the trial; it asks for needle ``trial`` modulo their number.

        Raises:
            ValueError: If ``depth`` is not in [0, 1], ``length`` is too short for the needles, or ``text`` is.
        """
        rng = random.Random(f"{self.seed}/{length}/{float(depth)}/{trial}")
        asked = trial % len(self.needles)
        question, answer = self._questions[asked], self._answers[asked]
        fixed = [self._pieces.bos, *self._hidden, question, answer]
        check_place(depth, length, sum(map(len, fixed)), "needle prompt")
        room = length - sum(map(len, fixed))
        depths = [depth if number == asked else rng.random() for number in range(len(self.needles))]
        order = sorted(range(len(depths)), key=lambda number: depths[number])
        places = [0, *(round(depths[number] * room) for number in order), room]
        text = cut_text(self.text, [end - start for start, end in pairwise(places)], rng)
        hidden = [
            piece for slice_, number in zip(text, order, strict=False) for piece in (slice_, self._hidden[number])
        ]
        earlier = sum(len(self._hidden[number]) for number in order[: order.index(asked)])
        start = len(self._pieces.bos) + earlier + round(depth * room)
        tokens = join([self._pieces.bos, *hidden, text[-1], question, answer])
        return Prompt(tokens, len(answer), distance=length - len(answer) - start)
