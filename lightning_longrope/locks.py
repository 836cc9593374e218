"""One run at a time in a folder.

A lock is one of the operating system on a file (flock): it ends with the process that holds it, however that ends, so a
lock file that is left means nothing. Beside it stands who holds it. On file systems of a network the lock holds as far
as their locks do: on NFS 4 and on Lustre with ``flock`` between nodes, on some others only within one.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_longrope.files import naming, write_json

log = logging.getLogger(__name__)


@contextmanager
def hold(lock: Path, what: str | Path, wait: bool = False) -> Iterator[None]:
    """Holds a lock.

    Args:
        lock: Its file, which is removed at the end; its folder is made where it is missing.
        what: What it protects, for messages.
        wait: Wait for another process that holds it, and say so, in place of an error.

    Raises:
        ValueError: If another process holds it, and that is not to be waited for.
        OSError: If the file cannot be written.
    """
    holder, file = lock.with_name(f"{lock.name}.json"), FileLock(lock)
    with naming(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file.acquire(timeout=0)
        except Timeout:
            _blocked(what, holder, wait)
            file.acquire()
    try:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
        file.release()


def _blocked(what: str | Path, holder: Path, wait: bool) -> None:
    """Says who holds a lock, or refuses to go on."""
    try:
        found = json.loads(holder.read_text())
        who = f"process {found['pid']} on {found['host']}, at work there since {found['since']}"
    except (OSError, ValueError, KeyError):  # it has just begun
        who = "another process"
    if not wait:
        raise ValueError(f"{what} belongs to {who}: wait until that has ended, or choose another folder.")
    log.info("Waiting for %s, which belongs to %s", what, who)
