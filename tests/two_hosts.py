"""Two hosts made of network namespaces, joined by a cable: real ``torchrun --nnodes=2`` on one machine.

Each namespace belongs to a process that sleeps and ends with the test, so nothing has a name and nothing can be left.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

LONGEST = 600  # seconds after which the hosts vanish by themselves


@dataclass
class Host:
    """One of the hosts. ``number`` is its node rank; rank 0 runs on host 0."""

    number: int
    sleeper: subprocess.Popen[bytes]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"node-{'ab'[self.number]}"

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number + 1}"

    def inside(self, *words: str) -> list[str]:
        return ["nsenter", "--target", str(self.sleeper.pid), "--net", "--uts", *words]

    def cable(self, state: str) -> None:
        """``up`` or ``down``."""
        subprocess.run(self.inside("ip", "link", "set", "cable", state), check=True)

    def start(self, words: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Starts a command on the host; what it prints goes to ``log``."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.inside(*words), stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )
        self.processes.append(process)
        return process

    def signal(self, number: signal.Signals, only: str = "") -> None:
        """Sends a signal to every process of the host, as losing its power or freezing does, or to ``only`` some."""
        net = os.readlink(f"/proc/{self.sleeper.pid}/ns/net")
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                here = folder.name != str(self.sleeper.pid) and os.readlink(folder / "ns" / "net") == net
                if here and only in (folder / "environ").read_text(errors="replace"):
                    os.kill(int(folder.name), number)


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Host a and host b.

    Raises:
        OSError, subprocess.CalledProcessError: If this machine forbids them.
    """
    hosts: list[Host] = []
    try:
        for number in range(2):
            script = f"hostname node-{'ab'[number]} && echo up && exec sleep {LONGEST}"
            words = ["unshare", "--net", "--uts", "sh", "-c", script]
            sleeper = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            hosts.append(Host(number, sleeper))
            assert sleeper.stdout is not None
            if not sleeper.stdout.readline():
                raise OSError(f"{' '.join(words[:3])}: {sleeper.communicate()[1].decode().strip()}")
        ends = [["name", "cable", "netns", str(host.sleeper.pid)] for host in hosts]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        for host in hosts:
            subprocess.run(host.inside("ip", "addr", "add", f"{host.address}/24", "dev", "cable"), check=True)
            subprocess.run(host.inside("ip", "link", "set", "lo", "up"), check=True)
            host.cable("up")
        yield hosts
    finally:
        for host in hosts:
            if host.sleeper.poll() is None:
                host.signal(signal.SIGKILL)
            host.sleeper.kill()
            host.sleeper.communicate()
            for process in host.processes:
                process.kill()
                process.wait()


def forbidden() -> str | None:
    """Why this machine cannot make two hosts, None where it can."""
    try:
        with two_hosts():
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)


def launch(hosts: list[Host], words: list[str], logs: Path, **environment: str) -> list[subprocess.Popen[bytes]]:
    """Starts ``longrope`` on both hosts with the launch script; they print to ``logs/a.log`` and ``b.log``."""
    logs.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).parents[1]
    job = {"NNODES": "2", "MASTER_ADDR": hosts[0].address, "MAX_RESTARTS": "0", "GLOO_SOCKET_IFNAME": "cable"}
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    return [
        host.start(
            [str(root / "configs" / "launch" / "torchrun.sh"), *words],
            logs / f"{host.name[-1]}.log",
            **{**job, **paths, "NODE_RANK": str(host.number), "LOCAL_ADDR": host.address, **environment},
        )
        for host in hosts
    ]


def wait_until(ready: Callable[[], bool], processes: list[subprocess.Popen[bytes]], limit: float = 200) -> None:
    """Waits until ``ready()``; fails after ``limit`` seconds or when a process has ended."""
    end = time.monotonic() + limit
    while not ready():
        assert time.monotonic() < end, f"nothing came within {limit} s"
        assert all(process.poll() is None for process in processes), "a process has ended too early"
        time.sleep(0.02)
