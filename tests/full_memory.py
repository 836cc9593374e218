"""A rank whose memory does not suffice, now and then, for the passes of a search with more than one row."""

import os
import random

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_longrope import evaluating


class FullMemory(TorchDispatchMode):
    """On one rank, some operations on tensors of the given first sizes fail for lack of memory."""

    def __init__(self, rank, sizes):
        super().__init__()
        self.rank, self.sizes, self.failures, self.draws = str(rank), sizes, 0, random.Random(0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        real = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.ndim > 1 and not arg.is_meta]
        size = real[0].shape[0] if real and real[0].dtype == torch.float32 else 0
        big = size in self.sizes and func in (torch.ops.aten.mm.default, torch.ops.aten.mul.Tensor)
        if big and os.environ["RANK"] == self.rank and self.draws.random() < 0.02:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return func(*args, **(kwargs or {}))


def fill_memory(rank, sizes):
    """From now on the searches of this process run in such a memory; returns it."""
    attempt, full = evaluating.Evaluator._attempt, FullMemory(rank, sizes)

    def attempt_in_full_memory(self, rows, tables):
        with full:
            self._most_rows = None  # so that it happens again and again
            return attempt(self, rows, tables)

    evaluating.Evaluator._attempt = attempt_in_full_memory
    return full
