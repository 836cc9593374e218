"""Document questions: a long document that begins with its title, and the question for the title at the end.

::

    prompt   BOS  title  body . . . . . . . . . . . . . . . . . . . . . .  question  TITLE

The answer stands at the largest distance there is, and nothing marks it as a needle.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_longrope.retrieval.prompt import Pieces, Prompt, check_place, check_text, cut_text, join

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION = "\n\n(End of the document.)\n\nQuestion: What is the title of this document?\nAnswer: The title is"
KINDS = (
    "A Short History",
    "Notes on the Trade",
    "The Lost Maps",
    "Songs and Sayings",
    "A Field Guide",
    "The Last Winter",
)
OWNERS = ("Clockmakers", "Salt Miners", "River Pilots", "Beekeepers", "Bell Founders", "Lamp Lighters", "Weavers")
PLACES = ("Amber Bay", "Kestrel Hill", "Old Marrow", "the Seven Locks", "Upper Fenwick", "Saint Orla", "the North Quay")


@dataclass(frozen=True)
class TitledText:
    """A document whose title is known.

    Attributes:
        title: The title, one line.
        body: Text after the title.
    """

    title: str
    body: str


class DocumentQuestionPrompts:
    """Writes a document and the question for its title, of an exact token length.

    Args:
        tokenizer: A Hugging Face tokenizer. Its BOS opens every row where it has one.
        documents: Documents with titles, asked for in turn; their ends are cut to the length. Without them a slice of
            ``text`` gets a made-up title.
        text: Token stream to cut bodies from, [N] of integers; only without ``documents``.
        seed: Chooses slices and made-up titles.

    Raises:
        ValueError: If there is neither a document nor text, or a document has no title.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        documents: Sequence[TitledText] = (),
        text: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        if not documents:
            check_text(text, "A document question without documents")
        if any(not document.title.strip() for document in documents):
            raise ValueError("Every document of a document question needs a title, got an empty one.")
        self._pieces = Pieces(tokenizer)
        self.titles = tuple(document.title.strip() for document in documents)
        self._bodies = [self._pieces.encode_after("x\n\n", document.body) for document in documents]
        self._text = text
        self.seed = seed
        self._question = self._pieces.encode_after("x", QUESTION)
        sample = self.titles[0] if documents else _title(random.Random(0))
        self._pieces.check_decodes([*self._question, *self._answer(sample)], QUESTION + sample, "document question")

    def prompt(self, length: int, depth: float, trial: int) -> Prompt:
        """The prompt of one trial; the same three numbers always give the same tokens.

        Args:
            length: Tokens of the prompt and the answer together.
            depth: Of no effect: the title is where titles are.
            trial: Number of the trial; it takes document ``trial`` modulo their number.

        Raises:
            ValueError: If ``length`` is too short for the question, or the document or text is.
        """
        rng = random.Random(f"{self.seed}/{length}/{trial}")
        title = self.titles[trial % len(self.titles)] if self.titles else _title(rng)
        opening, answer = self._opening(title), self._answer(title)
        used = len(opening) + len(self._question) + len(answer)
        check_place(depth, length, used, "document question")
        body = self._body(length - used, trial, rng)
        tokens = join([opening, body, self._question, answer])
        return Prompt(tokens, len(answer), distance=length - len(answer) - len(self._pieces.bos))

    def _opening(self, title: str) -> list[int]:
        return self._pieces.bos + self._pieces.encode(f"{title}\n\n")

    def _answer(self, title: str) -> list[int]:
        return self._pieces.encode_after("The title is", f" {title}")

    def _body(self, size: int, trial: int, rng: random.Random) -> Sequence[int] | Tensor:
        if not self._bodies:
            assert self._text is not None
            return cut_text(self._text, [size], rng)[0]
        body = self._bodies[trial % len(self._bodies)]
        if len(body) < size:
            title = self.titles[trial % len(self.titles)]
            raise ValueError(f"The document {title!r} has {len(body)} tokens, this length needs {size} of it.")
        return body[:size]


def _title(rng: random.Random) -> str:
    return f"{rng.choice(KINDS)} of the {rng.choice(OWNERS)} of {rng.choice(PLACES)}"
