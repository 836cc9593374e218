"""What every strategy of this package shares: groups of ranks that hold one row together."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from typing_extensions import override

from lightning_longrope.sequence_parallel import ALONE, SequenceGroup, share_rows


class SequenceParallel(ParallelStrategy):
    """Mixin for a Lightning strategy: ``sequence_parallel_size`` consecutive ranks share the tokens of their rows.

    The ranks of a group read the same rows; ``model.hidden_states`` cuts them. Gradients are averaged over all ranks as
    ever, so the loss of a rank is the sum over its tokens x ranks / the tokens of all ranks (``LongRoPEModule`` does
    that). Weights stay whole or are sharded over all ranks, as the strategy does it.

    Expects a module whose ``model`` is a Hugging Face causal language model.

    Args:
        *args: The strategy's own.
        sequence_parallel_size: Ranks that share a row; divides the attention heads and the number of ranks. Groups fit
            into a node where it divides the devices of one.
        **kwargs: The strategy's own.

    Raises:
        ValueError: If the size is not positive; once the processes have met, if it does not divide their number or the
            heads of the model.
    """

    def __init__(self, *args: Any, sequence_parallel_size: int = 1, **kwargs: Any) -> None:
        if sequence_parallel_size < 1:
            raise ValueError(f"`sequence_parallel_size` must be at least 1, got {sequence_parallel_size}.")
        super().__init__(*args, **kwargs)
        self.sequence_parallel_size = sequence_parallel_size
        self.sequence_group = ALONE
        self._rows_compared = True

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        size = self.sequence_parallel_size
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        size = self.sequence_parallel_size
        if self.world_size % size:
            raise ValueError(
                f"`sequence_parallel_size` ({size}) must divide the number of ranks ({self.world_size}):"
                " change it, or the devices and nodes of the trainer."
            )
        if size > 1:
            self.sequence_group = SequenceGroup(self._own_group())

    def _own_group(self) -> torch.distributed.ProcessGroup:
        """This rank's group; every rank makes all of them."""
        size, timeout = self.sequence_parallel_size, getattr(self, "_timeout", None)
        starts = range(0, self.world_size, size)
        groups = [torch.distributed.new_group(list(range(first, first + size)), timeout) for first in starts]
        return groups[self.global_rank // size]

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if self.sequence_parallel_size > 1:
            share_rows(_model_of(self.lightning_module), self.sequence_group)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._rows_compared = self.sequence_parallel_size == 1

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refuses rows that differ within a group, at the first batch: parts of other texts would be put together.

        Raises:
            ValueError: On all ranks of the group.
        """
        super().on_train_batch_start(batch, batch_idx)
        if self._rows_compared or not isinstance(batch, dict) or "input_ids" not in batch:
            return
        self._rows_compared = True
        if not self.sequence_group.alike(batch["input_ids"]):
            raise ValueError(
                f"The {self.sequence_parallel_size} ranks that share rows were given different ones: let the sampler or"
                " stream take its share by `num_replicas` and `rank` of `trainer.strategy.distributed_sampler_kwargs`."
            )

    @override
    def teardown(self) -> None:
        model = getattr(self.lightning_module, "model", None)
        if self.sequence_parallel_size > 1 and model is not None:
            model.sequence_group = ALONE
        super().teardown()


def _model_of(module: LightningModule | None) -> Any:
    model = getattr(module, "model", None)
    if not hasattr(model, "get_decoder"):
        raise ValueError(
            "`sequence_parallel_size` needs a module with a Hugging Face causal language model in `model`,"
            f" got {type(module).__name__}: use LongRoPEModule or a subclass."
        )
    return model
