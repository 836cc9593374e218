"""What the retrieval callbacks share: trials of equal length in batches, hits by depth, answers for people to read."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_longrope import scoring
from lightning_longrope.callbacks.measurement import Measurement, MeasuringCallback, untraced
from lightning_longrope.isolation import fit_for_long_rows
from lightning_longrope.retrieval import Prompt, wilson_interval


class Prompts(Protocol):
    """Writes the prompt of a trial, a pure function of its three numbers."""

    def prompt(self, length: int, depth: float, trial: int) -> Prompt:
        """The prompt, exactly ``length`` tokens with its answer."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote where the answer belongs.

    Attributes:
        metric: Name of the task.
        length: Tokens of the prompt and the answer.
        depth: Where the needle was; None where it has no place.
        expected: The true answer.
        given: What greedy decoding gave, a few tokens longer.
    """

    metric: str
    length: int
    depth: float | None
    expected: str
    given: str


class RetrievalCallback(MeasuringCallback):
    """Base of the retrieval callbacks. Subclasses name their ``metric`` and write ``make_prompts``.

    One forward pass scores a batch of trials: greedy decoding repeats the answer exactly when the most likely token is
    right at each answer position given the true prefix, so nothing is generated and no cache is kept, and only the
    answer positions go through the output head.

    Logs ``{metric}/{length}``, the fraction of answers right in every token over all depths, in [0, 1]; ``results``
    has the depths too. Intervals are 95 % Wilson intervals.

    Args:
        lengths: Lengths of prompt and answer together in tokens; the datamodule's ``seq_len`` by default.
        depths: Depths of the needle in [0, 1], or how many of them, evenly spread from 0 to 1 (one is 0.5); None for a
            task whose answer has a fixed place.
        trials: Trials for each length and depth, over all ranks together.
        split: Split of the datamodule to take text from.
        batch_tokens: Tokens of a forward pass; a longer prompt goes alone.
        seed: Chooses keys and text.
        every_n_steps: Optimizer steps between two measurements of a fit; None measures at every validation.
        every_n_epochs: The same in epochs.

    Raises:
        ValueError: If a number is out of range, or in ``setup`` if a length is too short for the prompt.
    """

    metric: ClassVar[str]

    def __init__(
        self,
        lengths: Sequence[int] | None,
        depths: int | Sequence[float] | None,
        trials: int,
        split: str,
        batch_tokens: int,
        seed: int,
        every_n_steps: int | None,
        every_n_epochs: int | None,
    ) -> None:
        super().__init__(lengths, split, batch_tokens, seed, every_n_steps, every_n_epochs)
        self.depths = _spread(depths) if isinstance(depths, int) else tuple(depths or (0.0,))
        if depths in (0, ()) or not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"`depths` must be a positive number of depths or depths in [0, 1], got {depths}.")
        if trials < 1:
            raise ValueError(f"`trials` must be at least 1, got {trials}.")
        self.trials = trials
        self._has_depths = depths is not None
        self._prompts: Prompts | None = None
        self._tokenizer: Any = None

    @abstractmethod
    def make_prompts(self, datamodule: Any) -> Prompts:
        """What writes the prompts, from the datamodule's text and tokenizer."""

    @override
    def prepare(self, datamodule: Any, lengths: Sequence[int]) -> None:
        self._tokenizer = datamodule.tokenizer
        self._prompts = self.make_prompts(datamodule)
        for length in lengths:
            for trial in range(self.trials):  # too short, or too little text for one of them: fails now
                self._prompts.prompt(length, self.depths[0], trial)

    @override
    def measure_length(self, trainer: Trainer, module: LightningModule, length: int) -> list[Measurement]:
        hits = self._hits(trainer, module, length).view(len(self.depths), self.trials).sum(1).long().tolist()
        by_depth = zip(self.depths, hits, strict=True)
        cells = [self._accuracy(length, depth, n, self.trials) for depth, n in by_depth] if self._has_depths else []
        return [*cells, self._accuracy(length, None, sum(hits), len(self.depths) * self.trials)]

    def answers(self, trainer: Trainer, module: LightningModule, count: int) -> Iterator[Answer]:
        """What the model really writes: ``count`` trials of each length, spread over the depths.

        Args:
            trainer: Its datamodule gives the text.
            module: Has the model in ``model``; every rank generates the same.
            count: Trials of each length.
        """
        self.connect(trainer)
        assert self._prompts is not None
        for length in self._resolved:
            for trial in range(count):
                depth = self.depths[trial * max(1, len(self.depths) // count) % len(self.depths)]
                prompt = self._prompts.prompt(length, depth, trial)
                with untraced(trainer, module):
                    given = _continue(module, prompt, self._tokenizer)
                texts = (self._tokenizer.decode(part).strip() for part in (prompt.tokens[-prompt.answer :], given))
                yield Answer(self.metric, length, depth if self._has_depths else None, *texts)

    def _hits(self, trainer: Trainer, module: LightningModule, length: int) -> Tensor:
        """1 where the answer was repeated in full, [depths * trials] float64."""
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

    def _accuracy(self, length: int, depth: float | None, hits: int, trials: int) -> Measurement:
        return Measurement(self.metric, length, depth, hits / trials, *wilson_interval(hits, trials), n=trials)


def _repeated(module: LightningModule, prompts: Sequence[Prompt]) -> Tensor:
    """1 for every prompt whose answer is right in each token, [B] float64, from one forward pass."""
    input_ids = torch.stack([prompt.tokens for prompt in prompts]).to(module.device)
    longest = max(prompt.answer for prompt in prompts)  # answers may have different numbers of tokens
    matches = scoring.greedy_matches(module.model, input_ids, longest).cpu()
    right = [bool(row[-prompt.answer :].all()) for row, prompt in zip(matches, prompts, strict=True)]
    return torch.tensor(right, dtype=torch.float64)


def _continue(module: Any, prompt: Prompt, tokenizer: Any, more: int = 8) -> Tensor:
    """How greedy decoding goes on after the question, [at most answer + more] int64."""
    input_ids = prompt.tokens[None, : -prompt.answer].to(module.device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    fit_for_long_rows(module.model, input_ids.shape[1])
    written = module.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=prompt.answer + more,
        do_sample=False,
        pad_token_id=padding,
    )
    return written[0, input_ids.shape[1] :].cpu()


def _spread(count: int) -> tuple[float, ...]:
    """``count`` depths evenly spread over [0, 1], the ends included."""
    return (0.5,) if count == 1 else tuple(i / (count - 1) for i in range(count))
