"""What SIGTERM does: the end of a process in good order, with the exit status that shells give it.

Schedulers (Slurm, Kubernetes) send SIGTERM some time before SIGKILL. Everything but a training step ends at once; what
is finished is on the disk anyway, and the same command goes on from there. Imports next to nothing, since it has to be
in place before torch and Lightning are.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STATUS = 128 + signal.SIGTERM

AGAIN = "The same command goes on from what is finished."


class StoppedError(SystemExit):
    """The process was told to stop.

    Args:
        what: What was saved, a sentence; empty if nothing is to be said of it.
        together: Whether all processes of the run stop at this point.
        first: Whether this is the first of them, which says so for all.
    """

    def __init__(self, what: str = "", together: bool = False, first: bool = True) -> None:
        super().__init__(STATUS)
        self.what, self.together, self.first = what, together, first

    def __str__(self) -> str:
        return f"stopped by SIGTERM. {self.what or AGAIN}"


@contextmanager
def stoppable() -> Iterator[None]:
    """Raises ``StoppedError`` wherever the main thread is when SIGTERM comes; in another thread it does nothing.

    After that the process is meant to end: where the signal had its default, one more ends it at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except StoppedError:
        before = _leave if before is signal.SIG_DFL else before
        raise
    finally:
        restore(before)


def restore(handler: Any) -> None:
    """Puts back what ``signal.signal`` or ``signal.getsignal`` has returned."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)


def _leave(number: int, frame: FrameType | None) -> None:
    """One more signal ends a process that is about to end, with the same status."""
    os._exit(STATUS)


def _stop(number: int, frame: FrameType | None) -> None:
    raise StoppedError
