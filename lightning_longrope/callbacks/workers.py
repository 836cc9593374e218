"""The ranks of a trainer as workers that share a search or a measurement."""

from functools import cached_property

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class TrainerWorkers:
    """The ranks of a trainer; those that read the same samples are one worker.

    Such are the ranks of a sequence- or tensor-parallel group, by the strategy's ``distributed_sampler_kwargs``.

    Args:
        trainer: Its strategy knows the ranks.
    """

    def __init__(self, trainer: Trainer) -> None:
        samplers = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        self.rank = int(samplers.get("rank", trainer.global_rank))
        self.world_size = int(samplers.get("num_replicas", trainer.world_size))
        self._trainer = trainer

    @property
    def writes(self) -> bool:
        """Whether this process keeps the files."""
        return self._trainer.is_global_zero

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a float64 tensor over all workers, on the CPU; every rank must call it."""
        if self._trainer.world_size == 1:
            return values
        part = values if self._counts else torch.zeros_like(values)
        return self._reduce(part).cpu()

    @cached_property
    def _counts(self) -> bool:
        """Whether this rank is the first of its worker, the one that counts in a sum."""
        if self.world_size == self._trainer.world_size:
            return True
        own = torch.zeros(self._trainer.world_size, dtype=torch.float64)
        own[self._trainer.global_rank] = self.rank
        return bool(self._reduce(own).tolist().index(self.rank) == self._trainer.global_rank)

    def _reduce(self, values: Tensor) -> Tensor:
        strategy = self._trainer.strategy
        return strategy.reduce(values.to(strategy.root_device), reduce_op="sum")
