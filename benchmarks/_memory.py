"""Memory of this process: the most it took inside a context, and what becomes of what is freed."""

import ctypes
import os
import platform
import sys
import threading
import time
from pathlib import Path

KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_ARENA_MAX": "1"}


def keep_freed_memory() -> None:
    """Starts this script again where the C library would give memory back, which it decides before the first line."""
    if not KEPT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT)


def anonymous_bytes() -> int:
    """Anonymous memory of this process: pages of libraries come and go as the system likes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def hand_back_memory() -> None:
    """Gives freed memory back to the system, so that what is taken next is seen, and none of what was there before."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class Memory:
    """Watches the anonymous memory of this process every two milliseconds.

    Attributes:
        before: Bytes when the context was entered or ``begin`` was called, freed ones given back.
        peak: Most bytes inside.
    """

    def __enter__(self) -> "Memory":
        self.begin()
        self._running = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def begin(self) -> None:
        """Forgets what was before."""
        hand_back_memory()
        self.before = self.peak = anonymous_bytes()

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()

    def _watch(self) -> None:
        while self._running:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.002)
