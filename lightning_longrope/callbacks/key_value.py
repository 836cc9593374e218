"""Key/value retrieval: does the model find the value of one key in a long list of random pairs?"""

from typing import Any

from typing_extensions import override

from lightning_longrope.callbacks.retrieval import RetrievalCallback
from lightning_longrope.retrieval import KeyValuePrompts


class KeyValueRetrieval(RetrievalCallback):
    """Measures how often the model gives the value of one key of a long list of ``'key' = 'value'`` lines.

    Keys and values are the first 8 and 4 hexadecimal digits of random UUIDs, and the question stands at the end. The
    quoted value must be right in every token, so no substring counts by chance.

    Logs ``key_value/{length}``, the fraction of right values over all depths, in [0, 1]; ``results`` has the depths
    too. Intervals are 95 % Wilson intervals.

    Args:
        lengths: Lengths of prompt and answer together in tokens; the datamodule's ``seq_len`` by default.
        depths: Depths of the pair in [0, 1], or how many of them, evenly spread from 0 to 1 (one is 0.5).
        trials: Trials for each length and depth, over all ranks together.
        batch_tokens: Tokens of a forward pass; a longer prompt goes alone.
        seed: Chooses keys and values.
        every_n_steps: Optimizer steps between two measurements of a fit; None measures at every validation.
        every_n_epochs: The same in epochs.

    Raises:
        ValueError: If a number is out of range, or in ``setup`` if a length is too short for one pair.
    """

    metric = "key_value"

    def __init__(
        self,
        lengths: tuple[int, ...] | None = None,
        depths: int | tuple[float, ...] = 5,
        trials: int = 20,
        batch_tokens: int = 16384,
        seed: int = 0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
    ) -> None:
        super().__init__(lengths, depths, trials, "validation", batch_tokens, seed, every_n_steps, every_n_epochs)

    @override
    def make_prompts(self, datamodule: Any) -> KeyValuePrompts:
        return KeyValuePrompts(datamodule.tokenizer, self.seed)
