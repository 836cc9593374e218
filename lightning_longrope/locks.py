"""One run at a time in a folder.

A lock is one of the operating system on a file (flock): it ends with the process that holds it, however that ends. The
file stays, since whoever waits for it has it open already, and means nothing by itself. Beside it stands who holds it.
On file systems of a network the lock holds as far as their locks do: on NFS 4 and on Lustre with ``flock`` between
nodes, on some others only within one; where there are no locks at all, one warning says so.
"""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_longrope.files import naming, write_json

log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def hold(lock: Path, what: str | Path, wait: bool = False, remedy: str = "choose another folder") -> Iterator[None]:
    """Holds a lock.

    Args:
        lock: Its file, which stays; its folder is made where it is missing.
        what: What it protects, for messages.
        wait: Wait for another process that holds it, and say so, in place of an error.
        remedy: What to do but to wait, for the error.

    Raises:
        ValueError: If another process holds it, and that is not to be waited for.
        OSError: If the file cannot be written.
    """
    holder, file = lock.with_name(f"{lock.name}.json"), FileLock(lock, fallback_to_soft=False)
    with naming(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file.acquire(timeout=0)
        except Timeout:
            who = _who(holder)
            if not wait:
                raise ValueError(f"{what} belongs to {who}: wait until that has ended, or {remedy}.") from None
            log.info("Waiting for %s, which belongs to %s", what, who)
            file.acquire()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _warn(os.strerror(error.errno))
    try:
        _note(holder)
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        file.release()


def _note(holder: Path) -> None:
    """Writes who holds a lock, where that can be written: only messages need it."""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    with suppress(OSError):
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})


def _who(holder: Path) -> str:
    try:
        found = json.loads(holder.read_text())
        return f"process {found['pid']} on {found['host']}, at work there since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or could not say
        return "another process"


@cache
def _warn(why: str) -> None:
    """Says once what the file system lacks."""
    log.warning("There are no file locks here (%s): see to it that no two runs write into one folder.", why)
