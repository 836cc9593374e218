"""What each word after ``longrope`` does."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module

from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_longrope import peers
from lightning_longrope.out_of_memory import is_out_of_memory
from lightning_longrope.plain_errors import plain
from lightning_longrope.redaction import redact
from lightning_longrope.streams import GONE, nobody_reads, write_out

log = logging.getLogger("lightning_longrope")

_LONGEST = 1500  # characters of an error; files that are none of the expected kind are quoted in it

COMMANDS = {"run": "recipe.run", "estimate": "estimate.estimate"}
COMMANDS |= dict.fromkeys(("fit", "validate", "test", "search", "compare"), "train.trainer")
COMMANDS |= {"eval": "evaluation.evaluate", "data": "data.data", "export": "export.export", "report": "report.report"}
COMMANDS |= {"generate": "generate.generate", "tokenize": "tokenize.tokenize", "doctor": "doctor.doctor"}
"""Module and function of each word."""


def command_of(word: str) -> Callable[[str, list[str]], None]:
    """What a word runs, a function of the word and of those after it.

    Imports its module alone: ``longrope doctor`` has to run where an old torch or transformers lets no other do so.
    """
    module, name = COMMANDS[word].split(".")
    function: Callable[[str, list[str]], None] = getattr(import_module(f"lightning_longrope.commands.{module}"), name)
    return function


def run_command(command: str, arguments: list[str]) -> int:
    """Runs one command of the command line; see ``__main__``.

    Returns:
        The exit status: 2 after one line on what the user can mend, which starts with ``longrope: error:``; 1 after
        such a line on another process of the run that was lost.
    """
    _quiet()
    try:
        if command not in COMMANDS:
            raise ValueError(f"there is no command {command!r}; there are {', '.join(COMMANDS)}.")
        command_of(command)(command, arguments)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            write_out()
            return GONE
        lost = peers.explain(error)
        mistake = isinstance(error, ValueError | OSError | MisconfigurationException) or _is_lacking(error)
        advised = is_out_of_memory(error) and hasattr(error, "__notes__")
        if os.environ.get("LONGROPE_TRACEBACK") or not (lost or mistake or advised):
            raise
        if not (lost or isinstance(error, peers.DecidedError)):
            sys.stderr.write(f"longrope: error: {_line(error)}\n")
        return 1 if lost else 2
    return 0


def _is_lacking(error: Exception) -> bool:
    """Whether an error says what has to be installed, or which accelerator a strategy needs."""
    lacking = isinstance(error, ImportError) and "pip install" in str(error)
    return lacking or (isinstance(error, RuntimeError) and "is only supported on CUDA GPUs" in str(error))


_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make space there and give the same command again.")
_REMEDIES |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Choose another folder, or change who may write.")


def _line(error: Exception) -> str:
    """An error in one line that may be shown to anybody; what was noted on it comes first, since it is what to do."""
    text = _joined([str(error)])
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.strerror}: {redact(str(error.filename))}. {_REMEDIES.get(error.errno or 0, '')}".rstrip()
    if notes := getattr(error, "__notes__", []):
        text = f"{_joined(notes)} ({text.split(' Exception raised from', 1)[0]})"
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 200]} ... {text[-195:]}"


def _joined(texts: list[str]) -> str:
    """Texts of several lines in one, without credentials; it is the lines that tell where a value ends."""
    return " ".join(plain(redact("\n".join(texts))).split())


def _is_no_tip(record: logging.LogRecord) -> bool:
    """False for Lightning's hints at products of its makers."""
    return "Tip:" not in record.getMessage()


def _quiet() -> None:
    """Messages of this package on, advice that does not fit its runs off."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.WARNING)
    log.propagate = False
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        "Total length of `list` across ranks is zero.*",  # no validation text: nothing to validate
        ".*Checkpoint directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message)
