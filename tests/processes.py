"""Real processes for tests: forked ranks with the environment that torchrun gives them."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTITIONED = {
    f"stage3_{name}": 0
    for name in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
}
"""Entries of ``zero_optimization`` for weights of any size to be partitioned: by default small ones stay whole."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(world_size: int, work: Callable[..., Any], *arguments: Any, logs: Path) -> list[Any]:
    """Forks ``world_size`` ranks that each call ``work(*arguments)``; what they print goes to ``logs``."""
    context, port = multiprocessing.get_context("fork"), free_port()
    logs.mkdir(parents=True, exist_ok=True)
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, work, arguments, logs / f"rank{rank}.log"))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def run_ranks(world_size: int, work: Callable[..., Any], *arguments: Any, logs: Path, timeout: float = 120) -> None:
    """Runs ranks to their end; fails with what they printed if one of them does."""
    processes = start_ranks(world_size, work, *arguments, logs=logs)
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):  # the others wait for it in vain
            end = min(end, time.monotonic() + 5)
        time.sleep(0.05)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    texts = "\n".join(path.read_text()[-3000:] for path in sorted(logs.glob("rank*.log")))
    assert codes == [0] * world_size, f"exit codes {codes} (None: killed after {timeout} s)\n{texts}"


def _rank(rank: int, world_size: int, port: int, work: Callable[..., Any], arguments: Any, log: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
    }
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        warnings.simplefilter("ignore")
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            file.flush()
            os._exit(1)
        file.flush()
        os._exit(0)  # nothing of the parent's runs at exit


def whole(weight: Any) -> Any:
    """A copy of a parameter that a strategy may have sharded or partitioned; every rank asks for it."""
    if not hasattr(weight, "ds_id"):
        return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters(weight):
        return weight.detach().clone()
