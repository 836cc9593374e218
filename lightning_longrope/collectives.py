"""Errors that come from the loss of another process of a run."""

from torch.distributed import DistError

_MARKS = ("gloo/", "monitoredBarrier", "NCCL")


class LostPeerError(ConnectionError):
    """The run cannot go on: one of its processes is lost."""


def is_broken_collective(error: BaseException) -> bool:
    """Whether an error may come from such a loss: whoever makes lines of errors lets it through as it is."""
    if isinstance(error, LostPeerError | DistError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)
