"""Document questions: does the model still know the title at the end of a long document?"""

from typing import Any

from typing_extensions import override

from lightning_longrope.callbacks.measurement import text_of
from lightning_longrope.callbacks.retrieval import RetrievalCallback
from lightning_longrope.reading import blaming, read_text
from lightning_longrope.retrieval import DocumentQuestionPrompts, TitledText


class DocumentQuestion(RetrievalCallback):
    """Measures how often the model gives the title of a document that it has just read to the end.

    Logs ``document_question/{length}``, the fraction of titles right in every token, in [0, 1], with a 95 % Wilson
    interval.

    Args:
        lengths: Lengths of prompt and answer together in tokens; the datamodule's ``seq_len`` by default.
        files: Text files, each with its title as the first line, asked for in turn; each must fill the longest length.
            Without files, slices of the split's text get made-up titles.
        trials: Trials for each length, over all ranks together; with files, each file is one trial by default.
        split: Split of the datamodule to take text from.
        batch_tokens: Tokens of a forward pass; a longer prompt goes alone.
        seed: Chooses slices and made-up titles.
        every_n_steps: Optimizer steps between two measurements of a fit; None measures at every validation.
        every_n_epochs: The same in epochs.

    Raises:
        ValueError: If a number is out of range, or in ``setup`` if a length is too short or a file cannot be read.
    """

    metric = "document_question"

    def __init__(
        self,
        lengths: tuple[int, ...] | None = None,
        files: tuple[str, ...] = (),
        trials: int | None = None,
        split: str = "validation",
        batch_tokens: int = 16384,
        seed: int = 0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
    ) -> None:
        trials = (len(files) or 20) if trials is None else trials
        super().__init__(lengths, None, trials, split, batch_tokens, seed, every_n_steps, every_n_epochs)
        self.files = tuple(files)

    @override
    def make_prompts(self, datamodule: Any) -> DocumentQuestionPrompts:
        text = None if self.files else text_of(datamodule, "filler", self.split)
        return DocumentQuestionPrompts(datamodule.tokenizer, [_read(path) for path in self.files], text, self.seed)


def _read(path: str) -> TitledText:
    """A text file whose first line is its title.

    Raises:
        ValueError: If it cannot be read.
    """
    with blaming(f"Cannot read the document {path} of `files`"):
        title, _, body = read_text(path).lstrip().partition("\n")
    return TitledText(title, body.lstrip("\n"))
