"""Key/value prompts: a long list of random pairs, and the question for the value of one key at the end.

::

    prompt   BOS  header  = 'b1f0'   'k' = 'v' . . .  'KEY' = 'VALUE'  'k' = 'v' . . .  question  'VALUE'
                          the first line is cut, so that the tokens come out even

A key is the first 8 hexadecimal digits of a random UUID (version 4), a value the first 4. All lines look alike, so
nothing but the key itself leads to the value, unlike a pass key in ordinary text.

Source of the task: Liu et al., "Lost in the middle", arXiv:2307.03172.
"""

import random
import uuid
from itertools import accumulate
from typing import TYPE_CHECKING

from lightning_longrope.retrieval.prompt import Pieces, Prompt, check_place, join

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADER = "Key/value pairs to remember:\n\n"
LINE = "'{key}' = '{value}'\n"
QUESTION = "\nWhat is the value of the key '{key}'? The value of the key '{key}' is"
ANSWER = " '{value}'"


class KeyValuePrompts:
    """Writes key/value prompts of an exact token length.

    Args:
        tokenizer: A Hugging Face tokenizer. Its BOS opens every row where it has one.
        seed: Chooses keys and values.

    Raises:
        ValueError: If the tokenizer cannot write the prompt.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", seed: int = 0) -> None:
        self._pieces = Pieces(tokenizer)
        self.seed = seed
        self._opening = self._pieces.bos + self._pieces.encode(HEADER)
        pair = {"key": "0a1b2c3d", "value": "4e5f"}
        tokens = [t for piece in self._written(pair) for t in piece]
        expected = "".join(text.format(**pair) for text in (LINE, QUESTION, ANSWER))
        self._pieces.check_decodes(tokens, expected, "key/value prompt")

    def prompt(self, length: int, depth: float, trial: int) -> Prompt:
        """The prompt of one trial; the same four numbers always give the same tokens.

        Args:
            length: Tokens of the prompt and the answer together.
            depth: Where the pair asked for stands: 0 opens the list, 1 closes it; the nearest border of two lines.
            trial: Number of the trial; each has pairs of its own.

        Returns:
            The tokens, [length] int64; the answer is the quoted value, so a longer or shorter value is wrong.

        Raises:
            ValueError: If ``depth`` is not in [0, 1] or ``length`` is too short for one pair.
        """
        rng = random.Random(f"{self.seed}/{length}/{float(depth)}/{trial}")
        seen: set[str] = set()
        pair = _pair(rng, seen)
        line, question, answer = self._written(pair)
        used = len(self._opening) + len(line) + len(question) + len(answer)
        check_place(depth, length, used, "key/value prompt")
        others, borders = self._lines(length - used, len(line), rng, seen)
        before = min(borders, key=lambda border: abs(border - depth * len(others)))
        tokens = join([self._opening, others[:before], line, others[before:], question, answer])
        return Prompt(tokens, len(answer), distance=length - len(answer) - len(self._opening) - before)

    def _written(self, pair: dict[str, str]) -> list[list[int]]:
        """Tokens of the pair's line, of the question for it and of the answer."""
        after = self._pieces.encode_after
        asked = QUESTION.format(**pair)
        return [after("x\n", LINE.format(**pair)), after("'\n", asked), after(asked.strip(), ANSWER.format(**pair))]

    def _lines(self, room: int, typical: int, rng: random.Random, seen: set[str]) -> tuple[list[int], list[int]]:
        """Exactly ``room`` tokens of further lines, the first one cut, and where lines begin or end in them."""
        lines: list[list[int]] = []
        missing = room
        while missing > 0:
            texts = [LINE.format(**_pair(rng, seen)) for _ in range(-(-missing // typical))]
            lines += self._pieces.encode_all_after("x\n", texts)
            missing = room - sum(map(len, lines))
        ends = list(accumulate(map(len, lines), initial=0))
        cut = ends[-1] - room
        return [t for line in lines for t in line][cut:], [0, *(end - cut for end in ends if end > cut)]


def _pair(rng: random.Random, seen: set[str]) -> dict[str, str]:
    """A key that was not seen before and its value."""
    while (key := _digits(rng, 8)) in seen:
        pass
    seen.add(key)
    return {"key": key, "value": _digits(rng, 4)}


def _digits(rng: random.Random, count: int) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))[:count]
