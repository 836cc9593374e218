"""Standard streams as they come: closed ones, encodings that cannot say a letter, readers that have gone.

Imports next to nothing, since help needs it too.
"""

import os
import select
import sys
from contextlib import suppress

GONE = 141
"""Exit status that shells give a command whose reader has gone: 128 and the number of SIGPIPE."""


def make_ready() -> None:
    """Puts the null device in place of closed streams; letters that the output's encoding lacks are escaped.

    In the order of their numbers, so that no file that is opened later takes the place of one.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - until the end
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def write_out(text: str = "") -> int:
    """Writes a text and what is left for the standard output; what cannot be written is dropped.

    Returns:
        The exit status: 0, ``GONE`` without a word if nobody reads on, or 2 after a line that says what went wrong.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _drop()
        if isinstance(error, BrokenPipeError):
            return GONE
        sys.stderr.write(f"longrope: error: cannot write to the standard output: {error.strerror}.\n")
        return 2
    return 0


def nobody_reads() -> bool:
    """Whether the standard output is a pipe whose reader has gone."""
    with suppress(OSError, ValueError, AttributeError):  # no file, or no poll
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _drop() -> None:
    """Lets what is left go to the null device, where Python would complain on its way out."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
