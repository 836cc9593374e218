"""Passkey retrieval: does the model find five digits hidden in a long text?"""

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_longrope.callbacks.measurement import Measurement, text_of
from lightning_longrope.callbacks.retrieval import RetrievalCallback
from lightning_longrope.retrieval import PasskeyPrompts

SUCCESS = 0.2
"""Success rate below which a distance is out of reach (Position Interpolation, arXiv:2306.15595, section 3.3)."""


class PasskeyRetrieval(RetrievalCallback):
    """Measures how often the model repeats a key hidden at some depth of a prompt of some length.

    One forward pass scores a batch of trials: greedy decoding repeats the key exactly when the most likely token is
    right at each answer position given the true prefix, so nothing is generated and no cache is kept.

    Logs ``passkey/{length}``, the fraction of keys repeated in full over all depths, in [0, 1]; ``results`` has the
    depths too. Intervals are 95 % Wilson intervals. With two or more depths it also logs
    ``passkey_k_max/{length}``: the largest distance in tokens from key to answer such that at this and every smaller
    distance measured at least a fifth of the keys are repeated, 0 if there is none; its interval takes the ends of the
    rates' intervals. The protocol of Position Interpolation has 32 depths and 10 trials.

    Args:
        lengths: Lengths of prompt and answer together in tokens; the datamodule's ``seq_len`` by default.
        depths: Depths of the needle in [0, 1], or how many of them, evenly spread from 0 to 1 (one is 0.5).
        trials: Trials for each length and depth, over all ranks together.
        filler: What hides the needle: ``appendix`` is the prompt of the LongRoPE paper word for word, ``text`` is
            ordinary text of the split, for windows that prompt does not fit.
        split: Split of the datamodule to take the text from.
        batch_tokens: Tokens of a forward pass; a longer prompt goes alone.
        seed: Chooses keys and text.
        every_n_steps: Optimizer steps between two measurements of a fit; None measures at every validation.
        every_n_epochs: The same in epochs.

    Raises:
        ValueError: If a number is out of range, or in ``setup`` if a length is too short for the prompt.
    """

    metric = "passkey"

    def __init__(
        self,
        lengths: tuple[int, ...] | None = None,
        depths: int | tuple[float, ...] = 5,
        trials: int = 20,
        filler: Literal["appendix", "text"] = "appendix",
        split: str = "validation",
        batch_tokens: int = 16384,
        seed: int = 0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
    ) -> None:
        super().__init__(lengths, depths, trials, split, batch_tokens, seed, every_n_steps, every_n_epochs)
        self.filler: Literal["appendix", "text"] = filler

    @override
    def make_prompts(self, datamodule: Any) -> PasskeyPrompts:
        text = text_of(datamodule, "filler", self.split) if self.filler == "text" else None
        return PasskeyPrompts(datamodule.tokenizer, self.filler, text, self.seed)

    @override
    def measure_length(self, trainer: Trainer, module: LightningModule, length: int) -> list[Measurement]:
        found = super().measure_length(trainer, module, length)
        return found if len(self.depths) == 1 else [*found, self._k_max(length, found[:-1])]

    def _k_max(self, length: int, cells: Sequence[Measurement]) -> Measurement:
        """How far back keys are found, from the rates by depth."""
        assert self._prompts is not None
        distances = [self._prompts.prompt(length, depth, trial=0).distance for depth in self.depths]
        order = sorted(range(len(cells)), key=lambda place: distances[place])
        near = [distances[place] for place in order]
        value, low, high = (
            _reach(near, [rate(cells[place]) for place in order])
            for rate in (lambda cell: cell.value, lambda cell: cell.low, lambda cell: cell.high)
        )
        return Measurement("passkey_k_max", length, None, value, low, high, n=len(cells) * self.trials)


def _reach(distances: Sequence[int], rates: Sequence[float]) -> float:
    """The last of increasing distances up to which every rate is a success; 0 if the first one is none."""
    reached = 0
    for distance, rate in zip(distances, rates, strict=True):
        if rate < SUCCESS:
            break
        reached = distance
    return float(reached)
