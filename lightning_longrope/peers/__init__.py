"""The processes of a run that live on several nodes: whether each is still there, and what the first has decided.

A collective says little when a process is lost: gloo names an address, NCCL nothing, and a frozen host or a pulled
cable leaves everybody waiting until the timeout of the group. So every process keeps a line of its own to the first
one, the hub, which they find through the store that the launcher or rank 0 offers for the process group:

    rank 1 ---.        beats both ways, every few seconds
    rank 2 ----- rank 0    a line that breaks without a goodbye: the process is gone, known at once
    rank 3 ---'        a line silent for the timeout: the host is frozen or cut off

The hub tells all others who is lost. A process that learns it has some seconds to end by its own error, as gloo lets
it; where it is stuck in a collective, as NCCL may leave it, it is ended. The same lines carry what rank 0 decides
between the stages of a recipe, which may take hours and so must not wait in collectives.

Run with gloo on two network namespaces (killed, frozen and unplugged); with NCCL it has not been run.
"""

import atexit
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities import rank_zero_only

from lightning_longrope.collectives import LostPeerError
from lightning_longrope.peers.lines import TIMEOUT, DecidedError, Peer, Peers
from lightning_longrope.stopping import StoppedError

__all__ = [
    "TIMEOUT",
    "DecidedError",
    "LostPeerError",
    "Peer",
    "Peers",
    "connect",
    "current",
    "decide",
    "explain",
    "is_first",
    "launched",
    "leave",
    "wait",
]

_current: Peers | None = None


def current() -> Peers | None:
    """The processes of this run; None as long as it has only this one, or they have not been connected."""
    return _current


def launched() -> ClusterEnvironment | None:
    """The launcher that has started this process as one of several, None without one."""
    kinds: tuple[type[ClusterEnvironment], ...] = (
        TorchElasticEnvironment,
        SLURMEnvironment,
        LSFEnvironment,
        MPIEnvironment,
    )
    kind = next((kind for kind in kinds if kind.detect()), None)
    environment = None if kind is None else kind()
    return environment if environment is not None and environment.world_size() > 1 else None


def is_first() -> bool:
    """Whether this is the first process of the run, also before Lightning has numbered those started by hand."""
    if (launcher := launched()) is not None:
        return launcher.global_rank() == 0
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return getattr(rank_zero_only, "rank", 0) == 0 and node == "0"


def connect(environment: ClusterEnvironment, timeout: float = TIMEOUT) -> Peers:
    """Connects the processes of a run, if that has not been done.

    Args:
        environment: Knows the ranks. Every process must call this.
        timeout: Seconds within which all end after one has fallen silent; the last one that is given counts.
    """
    global _current
    if _current is None:
        ranks = environment.global_rank(), environment.node_rank(), environment.local_rank()
        me, address = Peer(*ranks, socket.gethostname()), environment.main_address
        _current = Peers(me, environment.world_size(), address, environment.main_port, timeout)
        atexit.register(_at_exit)
        _current.await_all()
    _current.timeout = timeout
    return _current


def decide(make: Callable[[], Any]) -> Any:
    """``Peers.decide``, or what ``make`` gives where there is only this process."""
    return make() if _current is None else _current.decide(make)


def wait() -> None:
    """``Peers.wait``, where there are other processes."""
    if _current is not None:
        _current.wait()


def explain(error: BaseException) -> bool:
    """Whether an error comes from the loss of another process; if so, who it is has been said.

    Otherwise the others learn that this process ends with the error.
    """
    if isinstance(error, StoppedError) and error.together:
        return False
    if _current is None or _current.explain(error) is None:
        return False
    _current.tell()
    return True


def leave() -> None:
    """Says goodbye to the others: that this process ends from now on is no loss. Python's own end does it too."""
    if _current is not None:
        _current.close()


def _at_exit() -> None:
    uncaught = getattr(sys, "last_value", None)  # what has ended a script
    if uncaught is None:
        leave()
    else:
        explain(uncaught)


def _forget() -> None:
    """In a forked process, such as a data loader's: it is none of those of the run."""
    global _current
    if _current is not None:
        _current.hang_up()
        _current = None


os.register_at_fork(after_in_child=_forget)
