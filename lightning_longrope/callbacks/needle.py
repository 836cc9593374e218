"""Needle retrieval: does the model find a sentence of one's own in a long text?"""

from typing import Any

from typing_extensions import override

from lightning_longrope.callbacks.measurement import text_of
from lightning_longrope.callbacks.retrieval import RetrievalCallback
from lightning_longrope.retrieval import Needle, NeedlePrompts
from lightning_longrope.retrieval.needle import BRIDGE, SOUP


class NeedleRetrieval(RetrievalCallback):
    """Measures how often the model answers a question about a sentence hidden in ordinary text.

    All needles are hidden in every prompt; trials ask for them in turn, the one asked for at the depth of the trial and
    the others at random places.

    Logs ``needle/{length}``, the fraction of answers right in every token over all depths, in [0, 1]; ``results`` has
    the depths too. Intervals are 95 % Wilson intervals.

    Args:
        lengths: Lengths of prompt and answer together in tokens; the datamodule's ``seq_len`` by default.
        needles: What is hidden and asked for: each a ``text``, a ``question`` and its ``answer``.
        depths: Depths of the needle in [0, 1], or how many of them, evenly spread from 0 to 1 (one is 0.5).
        trials: Trials for each length and depth, over all ranks together.
        split: Split of the datamodule to take the text from.
        batch_tokens: Tokens of a forward pass; a longer prompt goes alone.
        seed: Chooses text and the places of the needles not asked for.
        every_n_steps: Optimizer steps between two measurements of a fit; None measures at every validation.
        every_n_epochs: The same in epochs.

    Raises:
        ValueError: If a number is out of range or there is no needle, or in ``setup`` if a length is too short.
    """

    metric = "needle"

    def __init__(
        self,
        lengths: tuple[int, ...] | None = None,
        needles: tuple[Needle, ...] = (SOUP, BRIDGE),
        depths: int | tuple[float, ...] = 5,
        trials: int = 20,
        split: str = "validation",
        batch_tokens: int = 16384,
        seed: int = 0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
    ) -> None:
        super().__init__(lengths, depths, trials, split, batch_tokens, seed, every_n_steps, every_n_epochs)
        if not needles:
            raise ValueError("`needles` needs at least one needle, got none.")
        self.needles = tuple(needles)

    @override
    def make_prompts(self, datamodule: Any) -> NeedlePrompts:
        return NeedlePrompts(datamodule.tokenizer, self.needles, text_of(datamodule, "filler", self.split), self.seed)
