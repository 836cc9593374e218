"""What SIGTERM and Ctrl-C (SIGINT) do: the end of a process in good order, with the exit status that shells give it.

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

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(SystemExit):
    """The process was told to stop.

    No KeyboardInterrupt, also where Ctrl-C was pressed: Lightning would end such a one itself.

    Args:
        what: What was saved, a sentence; empty if nothing is to be said of it.
        together: Whether all processes of the run stop at this point.
        first: Whether this is the first of them, which says so for all.
        number: The signal.
    """

    def __init__(
        self, what: str = "", together: bool = False, first: bool = True, number: int = signal.SIGTERM
    ) -> None:
        super().__init__(128 + number)
        self.what, self.together, self.first, self.number = what, together, first, number

    def __str__(self) -> str:
        name = "Ctrl-C (SIGINT)" if self.number == signal.SIGINT else signal.Signals(self.number).name
        return f"stopped by {name}. {self.what or AGAIN}"


@contextmanager
def stoppable(last: bool = False) -> Iterator[None]:
    """Raises ``StoppedError`` wherever the main thread is when SIGTERM or SIGINT comes; elsewhere it does nothing.

    After that the process is meant to end: where a signal had its default, one more ends it at once. A signal that is
    ignored, as SIGINT is in the background of a shell, stays so.

    Args:
        last: Whether the process ends afterwards in any case: a signal on the way out is no crash either, and leaves
            the status that ``ends_with`` was given.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _stop)
    leaving = last
    try:
        yield
    except StoppedError:
        leaving = True
        raise
    finally:
        for number, handler in before.items():
            default = handler in (signal.SIG_DFL, signal.default_int_handler)
            restore(_leave if leaving and default else handler, number)


def taken() -> list[int]:
    """The signals that end a command now, by ``stoppable``."""
    return [number for number in _SIGNALS if signal.getsignal(number) is _stop]


def restore(handler: Any, number: int = signal.SIGTERM) -> None:
    """Puts back what ``signal.signal`` or ``signal.getsignal`` has returned."""
    signal.signal(number, signal.SIG_DFL if handler is None else handler)


_ending: list[int] = []  # the status of a command that has ended


def ends_with(status: int) -> None:
    """Keeps the exit status of a process whose command has ended, for a signal that comes on the way out."""
    _ending[:] = [status]


def _leave(number: int, frame: FrameType | None) -> None:
    """One more signal ends a process that is about to end: with its own status, or that of the signal if stopped."""
    os._exit(_ending[0] if _ending else 128 + number)


def _stop(number: int, frame: FrameType | None) -> None:
    raise StoppedError(number=number)
