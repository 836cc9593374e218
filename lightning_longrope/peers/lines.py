"""The lines between processes: what goes over them, and what their silence or end means."""

import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_longrope.collectives import LostPeerError, is_broken_collective
from lightning_longrope.redaction import redact

log = logging.getLogger("lightning_longrope")

TIMEOUT = 600.0
"""Seconds within which a run ends after one of its processes has fallen silent."""

_BEAT = 2.0  # most seconds between two signs of life; short, for the timeout may be set shorter at any time
_GRACE = 20.0  # most seconds between knowing of a loss and ending a process that is stuck
_VERDICT = 5.0  # seconds by which the lines may be slower than a collective that breaks
_AGAIN = "The same command goes on from what is saved."


@dataclass(frozen=True)
class Peer:
    """Where a process of the run is.

    Attributes:
        rank: Its number among all processes.
        node: Number of its node.
        local_rank: Its number on its node.
        host: Name of the node.
        address: Where its line to the hub comes from; empty for the hub.
    """

    rank: int
    node: int
    local_rank: int
    host: str
    address: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} ({', '.join(filter(None, (self.host, self.address)))})"


@dataclass(frozen=True)
class Loss:
    """A process that is lost.

    Attributes:
        peer: Which one.
        what: What became of it, as the end of a sentence.
        told: Whether it has said so itself, on its own node.
    """

    peer: Peer
    what: str
    told: bool = False

    def __str__(self) -> str:
        return f"{self.peer} {self.what}. {_AGAIN}"


class DecidedError(ValueError):
    """What rank 0 has refused, and says, for all."""


class _Line:
    """One end of a line: JSON messages, one a text line."""

    def __init__(self, end: socket.socket, peer: Peer | None = None) -> None:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.end, self.peer = end, peer
        self.heard = time.monotonic()
        self._rest = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends a message; what becomes of a broken line is found out when it is read."""
        with self._sending:
            try:
                self.end.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                log.debug("a line to %s is broken", self.peer)

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, None where the line has ended."""
        try:
            part = self.end.recv(1 << 16)
        except OSError:
            return None
        if not part:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + part).split(b"\n")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            return None


class Peers:
    """This process among those of the run. Every process makes this object at the same point.

    Args:
        me: This process.
        size: Number of processes.
        address: Host of rank 0.
        port: Port of the store there.
        timeout: Seconds within which all end after one of them has fallen silent; read anew while the run lasts.

    Attributes:
        loss: Who is lost, None as long as nobody is.
    """

    def __init__(self, me: Peer, size: int, address: str, port: int, timeout: float) -> None:
        self.me, self.size, self.timeout = me, size, timeout
        self.loss: Loss | None = None
        self._lines: list[_Line] = []
        self._values: dict[int, Any] = {}
        self._here: dict[int, int] = {}
        self._number = 0
        self._closed = self._told = False
        self._secret = ""
        self._changed = threading.Condition()
        self._selector = selectors.DefaultSelector()
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # else rank 0 offers the store
        self._store = TCPStore(
            address,
            port,
            is_master=me.rank == 0 and not agent,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
        self._listening: socket.socket | None = None
        if me.rank == 0:
            self._listen()
        else:
            self._call(address)
        threading.Thread(target=self._attend, name="peers", daemon=True).start()

    def decide(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives on rank 0, as JSON values, on every process; its ``ValueError`` is raised there too.

        Waits for rank 0 as long as that lives. All processes call this and ``wait`` in the same order.
        """
        number = self._next()
        if self.me.rank == 0:
            try:
                value = make()
            except ValueError as error:
                self._send_all(number=number, decided={"error": str(error)})
                raise
            self._send_all(number=number, decided={"value": value})
            return value
        self._until(lambda: number in self._values)
        decided = self._values.pop(number)
        if "error" in decided:
            raise DecidedError(decided["error"])
        return decided["value"]

    def wait(self) -> None:
        """Waits until all processes are here, as long as they live."""
        number = self._next()
        if self.me.rank == 0:
            self._arrived(number)
        else:
            self._lines[0].send(here=number)
        self._until(lambda: number in self._values)
        del self._values[number]

    def explain(self, error: BaseException) -> Loss | None:
        """Who is lost, if that is what an error comes from; otherwise the others learn of the error."""
        if isinstance(error, DecidedError):
            return None  # all end alike
        if is_broken_collective(error):
            with self._changed:
                self._changed.wait_for(lambda: self.loss, _VERDICT)
        if (loss := self.loss) is None:
            text = " ".join(f"{type(error).__name__}: {redact(str(error))}".split())
            self._end(f"has ended with {text[:300].rstrip('.')}")
        return loss  # which is not what comes of telling: the hub tells all who has ended

    def tell(self) -> None:
        """Says who is lost, once on every node."""
        loss, me = self.loss, self.me
        if loss is None or self._told:
            return
        self._told = True
        same = loss.peer.node == me.node
        if me.local_rank == (1 if same and loss.peer.local_rank == 0 else 0) and not (same and loss.told):
            log.error("longrope: error: %s", loss)

    def close(self) -> None:
        """Says goodbye: that this process ends is no loss."""
        if self.loss is None:
            self._closed = True
            self._send_all(bye=self.me.rank)

    @property
    def _grace(self) -> float:
        return min(_GRACE, self.timeout / 4)

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _until(self, ready: Callable[[], Any]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.loss or ready())
        if not ready():
            raise LostPeerError(str(self.loss))

    def _listen(self) -> None:
        both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        server = socket.create_server(("", 0), backlog=self.size, **both)  # type: ignore[arg-type]
        self._secret = secrets.token_hex(16)  # no line but from those who read the store
        self._store.set("longrope/hub", json.dumps([server.getsockname()[1], self._secret, asdict(self.me)]))
        self._selector.register(server, selectors.EVENT_READ)
        self._listening = server

    def _call(self, address: str) -> None:
        limit = time.monotonic() + self.timeout
        while True:
            port, secret, hub = json.loads(self._store.get("longrope/hub"))
            try:
                end = socket.create_connection((address, port), timeout=self.timeout)
                break
            except ConnectionRefusedError:  # a store that outlives restarts still names the hub before this one
                if time.monotonic() > limit:
                    raise
                time.sleep(0.2)
        end.settimeout(None)
        line = _Line(end, replace(Peer(**hub), address=_address(end)))
        line.send(hello=asdict(self.me), secret=secret)
        self._lines.append(line)
        self._selector.register(line.end, selectors.EVENT_READ, line)

    def await_all(self) -> None:
        """Waits until all processes have come; to be called first.

        Raises:
            LostPeerError: If not all come within the timeout.
        """
        number = self._next()
        limit = self.timeout
        if self.me.rank == 0:
            self._arrived(number)
        else:
            limit += 10  # rank 0 knows who is missing, and says so
        with self._changed:
            if not self._changed.wait_for(lambda: self.loss or number in self._values, limit):
                missing = set(range(1, self.size)) - {line.peer.rank for line in self._lines if line.peer}
                what = f"rank {', '.join(map(str, sorted(missing)))}, which did not come within {self.timeout:g} s"
                self._end(f"has waited for {what}")
                raise LostPeerError(f"{self.me} has waited for {what}.")
        if number not in self._values:
            raise LostPeerError(str(self.loss))
        del self._values[number]

    def _attend(self) -> None:
        """The thread: listens, beats, and judges silence."""
        beaten = 0.0
        while not self._closed and self.loss is None:
            interval = min(_BEAT, self.timeout / 8)
            for key, _ in self._selector.select(interval):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            if time.monotonic() - beaten >= interval:
                beaten = time.monotonic()
                self._send_all(beat=1)
            self._judge_silence()
        if self.loss is not None:
            self._end_at_last()

    def _accept(self) -> None:
        assert self._listening is not None
        end, _ = self._listening.accept()
        self._selector.register(end, selectors.EVENT_READ, _Line(end))

    def _read(self, line: _Line) -> None:
        messages = line.receive()
        for message in messages or ():
            if line.peer is None and message.get("secret") != self._secret:
                messages = None  # a stranger
                break
            self._obey(line, message)
        if messages is None:
            self._drop(line)
            if line.peer is not None and not self._closed:
                self._lose(Loss(line.peer, "is gone: its process was killed, or its node went down"))

    def _obey(self, line: _Line, message: dict[str, Any]) -> None:
        if "hello" in message:
            line.peer = replace(Peer(**message["hello"]), address=_address(line.end))
            self._lines.append(line)
            self._arrived(1)
        elif "here" in message:
            self._arrived(message["here"])
        elif "decided" in message:
            with self._changed:
                self._values[message["number"]] = message["decided"]
                self._changed.notify_all()
        elif "bye" in message:
            self._drop(line)
        elif "lost" in message:
            lost = Peer(**message["lost"])
            itself = line.peer is not None and lost.rank == line.peer.rank  # which does not know its address
            self._lose(Loss(line.peer if itself and line.peer else lost, message["what"], message["told"]))

    def _arrived(self, number: int) -> None:
        """Counts, on the hub, who has come to a point; the last lets all go on."""
        with self._changed:
            self._here[number] = self._here.get(number, 0) + 1
            if self._here[number] < self.size:
                return
            del self._here[number]
            self._send_all(number=number, decided={"value": None})
            self._values[number] = {"value": None}
            self._changed.notify_all()

    def _judge_silence(self) -> None:
        for line in self._lines:
            silence = time.monotonic() - line.heard
            if line.peer is not None and silence > self.timeout - self._grace:
                self._lose(Loss(line.peer, f"has not answered for {silence:.0f} s: its node is frozen or cut off"))
                return

    def _lose(self, loss: Loss) -> None:
        if self.loss is not None:
            return
        if self.me.rank == 0:  # first, for this process may end as soon as it knows
            self._send_all(lost=asdict(loss.peer), what=loss.what, told=loss.told)
        with self._changed:
            self.loss = loss
            self._changed.notify_all()

    def _end(self, what: str) -> None:
        """Tells the others that this process ends with an error."""
        self._closed = True
        self._send_all(lost=asdict(self.me), what=what, told=True)

    def _send_all(self, **message: Any) -> None:
        for line in list(self._lines):
            line.send(**message)

    def _end_at_last(self) -> None:
        """Ends the process if it has not ended by itself."""
        time.sleep(self._grace)
        if not self._closed:
            self.tell()
            os._exit(1)

    def _drop(self, line: _Line) -> None:
        self._selector.unregister(line.end)
        line.end.close()
        if line in self._lines:
            self._lines.remove(line)

    def hang_up(self) -> None:
        """Closes this process's ends of the lines: in a forked child they would outlive it."""
        for line in self._lines:
            line.end.close()
        if self._listening is not None:
            self._listening.close()


def _address(end: socket.socket) -> str:
    """Address of the other end of a line."""
    return str(end.getpeername()[0]).removeprefix("::ffff:")
