"""Passkey retrieval: does the model find five digits hidden in a long text?"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_longrope import scoring
from lightning_longrope.callbacks.measurement import Measurement, MeasuringCallback
from lightning_longrope.retrieval import PasskeyPrompts, Prompt, wilson_interval


class PasskeyRetrieval(MeasuringCallback):
    """Measures how often the model repeats a key hidden at some depth of a prompt of some length.

    One forward pass scores a batch of trials: greedy decoding repeats the key exactly when the most likely token is
    right at each answer position given the true prefix, so nothing is generated and no cache is kept.

    Logs ``passkey/{length}``, the fraction of keys repeated in full over all depths, in [0, 1]; ``results`` has the
    depths too. Intervals are 95 % Wilson intervals.

    Args:
        lengths: Lengths of prompt and answer together in tokens; the datamodule's ``seq_len`` by default.
        depths: Depths of the needle in [0, 1], or how many of them, evenly spread from 0 to 1 (one is 0.5).
        trials: Trials for each length and depth, over all ranks together.
        filler: What hides the needle: ``appendix`` is the prompt of the LongRoPE paper word for word, ``text`` is
            ordinary text of the split, for windows that prompt does not fit.
        split: Split of the datamodule to take the text from.
        batch_tokens: Tokens of a forward pass; a longer prompt goes alone.
        seed: Chooses keys and text.

    Raises:
        ValueError: If a number is out of range, or in ``setup`` if a length is too short for the prompt.
    """

    def __init__(
        self,
        lengths: tuple[int, ...] | None = None,
        depths: int | tuple[float, ...] = 5,
        trials: int = 20,
        filler: Literal["appendix", "text"] = "appendix",
        split: str = "validation",
        batch_tokens: int = 16384,
        seed: int = 0,
    ) -> None:
        super().__init__(lengths, split, batch_tokens, seed)
        self.depths = _spread(depths) if isinstance(depths, int) else tuple(depths)
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"`depths` must be a positive number of depths or depths in [0, 1], got {depths}.")
        if trials < 1:
            raise ValueError(f"`trials` must be at least 1, got {trials}.")
        self.trials = trials
        self.filler: Literal["appendix", "text"] = filler
        self._prompts: PasskeyPrompts | None = None

    @override
    def prepare(self, datamodule: Any, lengths: Sequence[int]) -> None:
        text = datamodule.filler(self.split) if self.filler == "text" else None
        self._prompts = PasskeyPrompts(datamodule.tokenizer, self.filler, text, self.seed)
        for length in lengths:
            self._prompts.prompt(length, self.depths[0], trial=0)  # too short, or too little text: fails now

    @override
    def measure_length(self, trainer: Trainer, module: LightningModule, length: int) -> list[Measurement]:
        hits = self._hits(trainer, module, length).view(len(self.depths), self.trials).sum(1).long().tolist()
        return [
            *(_measurement(length, depth, n, self.trials) for depth, n in zip(self.depths, hits, strict=True)),
            _measurement(length, None, sum(hits), len(self.depths) * self.trials),
        ]

    def _hits(self, trainer: Trainer, module: LightningModule, length: int) -> Tensor:
        """1 where the key was repeated in full, [depths * trials] float64."""
        assert self._prompts is not None
        cells = [(depth, trial) for depth in self.depths for trial in range(self.trials)]
        hits = torch.zeros(len(cells), dtype=torch.float64)
        rows = self.rows(length)
        for start, counts in self.share(trainer, range(0, len(cells), rows)):
            prompts = [self._prompts.prompt(length, depth, trial) for depth, trial in cells[start : start + rows]]
            right = _repeated(module, prompts)
            if counts:
                hits[start : start + rows] = right
        return self.sum_over_ranks(trainer, hits)


def _repeated(module: LightningModule, prompts: Sequence[Prompt]) -> Tensor:
    """1 for every prompt whose answer is right in each token, [B] float64, from one forward pass."""
    input_ids = torch.stack([prompt.tokens for prompt in prompts]).to(module.device)
    longest = max(prompt.answer for prompt in prompts)  # keys may have different numbers of tokens
    matches = scoring.greedy_matches(module.model, input_ids, longest).cpu()
    right = [bool(row[-prompt.answer :].all()) for row, prompt in zip(matches, prompts, strict=True)]
    return torch.tensor(right, dtype=torch.float64)


def _measurement(length: int, depth: float | None, hits: int, trials: int) -> Measurement:
    return Measurement("passkey", length, depth, hits / trials, *wilson_interval(hits, trials), n=trials)


def _spread(count: int) -> tuple[float, ...]:
    """``count`` depths evenly spread over [0, 1], the ends included."""
    return (0.5,) if count == 1 else tuple(i / (count - 1) for i in range(count))
