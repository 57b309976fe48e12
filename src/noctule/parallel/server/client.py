"""A worker's clients of all shards: each request gets one reply, over lost messages and restarts of a shard.

While a request has no reply, its shard is asked about it every second, and it is sent again if the shard does not have it. Pushes
are kept until they are in a snapshot; a shard that restarts from its snapshot gets the others again, and applies each once.
"""

import secrets
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from noctule.core.errors import ExchangeError
from noctule.exchange.group import TRAFFIC
from noctule.transport import messages
from noctule.transport.ticket import Ticket

ASK_SECONDS = 1.0
"""The time between two questions about a request, unless the timeout is short."""

_LOSSES = 10
"""How many times in a row a shard may have lost its state before that is an error."""


@dataclass(frozen=True)
class _Request:
    header: Mapping[str, Any]
    tensors: Sequence[bytes] = ()


@dataclass
class _Connection:
    """The requests to one shard, and what is known of it."""

    shard: int
    address: str
    facts: Mapping[str, str]
    seed: _Request | None
    """The initial weights, as long as the shard may want them."""
    todo: deque[_Request] = field(default_factory=deque)
    """Requests without a reply; the first one has been sent."""
    kept: deque[_Request] = field(default_factory=deque)
    """Pushes and moves that are in no snapshot of the shard yet."""
    number: int = 0
    """The number of the last push or move."""
    counted: int = 0
    """The number of the last push whose staleness was counted."""
    serial: int = 0
    """The serial of the last message."""
    pending: int = -1
    """The serial with which the first of `todo` was sent."""
    limit: int = 1 << 62
    """The largest size of a request's tensors."""
    answer: tuple[Mapping[str, Any], list[bytes]] = field(default_factory=lambda: ({}, []))
    """The last reply; it may hold weights."""
    losses: int = 0
    """How many times in a row the shard did not know this worker's session or last push."""
    why: str = ""
    """What the request waits for, as the shard says."""

    def __str__(self) -> str:
        """Name the shard, for errors."""
        return f"shard {self.shard} at {self.address}"


class ShardClients:
    """A worker's connections to all shards; made, it has joined them.

    Args:
        ticket: the addresses and keys.
        facts: what every worker must have alike, as text by name.
        seeds: for each shard the header and frames of the initial weights; None from all workers but worker 0.
        timeout_seconds: for any one reply.

    Raises:
        ExchangeError: a shard does not answer, or has another model.
    """

    def __init__(
        self,
        ticket: Ticket,
        *,
        facts: Mapping[str, str],
        seeds: Sequence[tuple[Mapping[str, Any], Sequence[bytes]] | None],
        timeout_seconds: float,
    ) -> None:
        from noctule.parallel.server.listen import ShardSockets

        self.timeout_seconds, self.session = timeout_seconds, secrets.token_hex(8)
        self.staleness: Counter[int] = Counter()
        self.connections = [
            _Connection(n, address, facts, seed and _Request({"kind": "seed", "facts": facts, **seed[0]}, seed[1]))
            for n, (address, seed) in enumerate(zip(ticket.addresses, seeds, strict=True))
        ]
        self._sockets = ShardSockets(ticket)
        self.failed = False
        """Whether an error has ended the communication."""
        try:
            for connection in self.connections:
                self._begin(connection, self._joining(connection))
            self.wait()
        except BaseException:
            self._sockets.close()
            raise

    def push(
        self, gradients: Sequence[Mapping[str, bytes]], *, pull: bool, versions: Sequence[Mapping[str, int]]
    ) -> None:
        """Send to each shard its gradients and the versions of their topologies; with ``pull`` the replies hold the weights."""
        self.wait()
        for connection, mine, places in zip(self.connections, gradients, versions, strict=True):
            header = {"kind": "push", "names": list(mine), "pull": pull, "versions": places}
            self._log(connection, header, list(mine.values()))

    def move(self, moves: Sequence[tuple[Mapping[str, Any], Sequence[bytes]]]) -> None:
        """Send the moves of connections to the shards that have any."""
        self.wait()
        for connection, (header, frames) in zip(self.connections, moves, strict=True):
            if frames:
                self._log(connection, {"kind": "move", **header}, frames)

    def pull(
        self, versions: Sequence[Mapping[str, int]], *, kept: str = ""
    ) -> list[tuple[Mapping[str, Any], list[bytes]]]:
        """The reply of each shard with its weights: the one to the last push if it holds them, or a new one.

        Args:
            versions: of the topologies that this worker has.
            kept: a key of the shard's optimizer state, whose tensors are wanted too.
        """
        self.wait()
        if kept or not all(connection.answer[1] for connection in self.connections):
            for connection, places in zip(self.connections, versions, strict=True):
                self._begin(connection, _Request({"kind": "pull", "versions": places, "kept": kept}))
            self.wait()
        found = [connection.answer for connection in self.connections]
        for connection in self.connections:
            connection.answer = ({}, [])
        return found

    def forget(self) -> None:
        """Drop replies that were not used: the next `pull` asks again."""
        self.wait()
        for connection in self.connections:
            connection.answer = ({}, [])

    def wait(self) -> None:
        """Wait until every request has its reply.

        Raises:
            ExchangeError: one has none after the timeout, or is refused.
        """
        begun = asked = time.monotonic()
        pause = min(ASK_SECONDS, self.timeout_seconds / 4)
        deadline = asked + self.timeout_seconds
        try:
            while busy := [connection for connection in self.connections if connection.todo]:
                now = time.monotonic()
                if now >= deadline:
                    raise self._late(busy[0])
                if now - asked >= pause:
                    asked = now
                    for (
                        connection
                    ) in self.connections:  # idle ones too, so that each shard knows that this worker lives
                        about = connection.pending if connection.todo else -1
                        self._send(connection, {"kind": "ask", "about": about})
                for shard, frames in self._sockets.receive(min(pause, deadline - now)):
                    if self._receive(self.connections[shard], frames):
                        deadline = time.monotonic() + self.timeout_seconds
        except BaseException:
            self.failed = True
            raise
        finally:
            TRAFFIC.seconds += time.monotonic() - begun

    def close(self) -> None:
        """Leave, so that no worker waits for this one, unless an error came before; then disconnect."""
        try:
            if not self.failed:
                self.wait()
                for connection in self.connections:
                    self._begin(connection, _Request({"kind": "leave", "number": connection.number}))
                self.wait()
        finally:
            self._sockets.close()

    # Inside.

    def _joining(self, connection: _Connection) -> _Request:
        return _Request({"kind": "join", "facts": connection.facts})

    def _log(self, connection: _Connection, header: Mapping[str, Any], frames: Sequence[bytes]) -> None:
        """Send a numbered request, which is kept to be sent again after a restart of the shard."""
        connection.number += 1
        request = _Request({**header, "number": connection.number}, frames)
        connection.kept.append(request)
        self._begin(connection, request)

    def _begin(self, connection: _Connection, request: _Request) -> None:
        connection.todo.append(request)
        self._send_first(connection)

    def _send_first(self, connection: _Connection) -> None:
        """Send the first of the requests without a reply."""
        if connection.todo:
            request = connection.todo[0]
            if (size := sum(map(len, request.tensors))) > connection.limit:
                self.failed = True
                raise ExchangeError(
                    f"{request.header['kind']} of {size:,} bytes to {connection}, which takes "
                    f"{connection.limit:,}: use more shards, or a server with a larger max_bytes"
                )
            self._send(connection, request.header, request.tensors)
            connection.pending = connection.serial

    def _send(self, connection: _Connection, header: Mapping[str, Any], tensors: Sequence[bytes] = ()) -> None:
        connection.serial += 1
        frames = messages.write({**header, "session": self.session, "serial": connection.serial}, tensors)
        TRAFFIC.sent_bytes += sum(map(len, frames))
        self._sockets.send(connection.shard, frames)

    def _receive(self, connection: _Connection, frames: Sequence[bytes]) -> bool:
        """Read a message; whether it was the reply to the pending request."""
        header, tensors = messages.read(frames)
        serial = messages.field(header, "serial", int)
        if "waiting" in header:
            if serial > connection.pending and connection.todo:
                connection.why = str(header.get("why", ""))
                if not header["waiting"]:  # the shard does not have the request
                    self._send_first(connection)
            return False
        if not connection.todo or serial != connection.pending:
            return False
        connection.why = ""
        if "error" in header:
            raise ExchangeError(f"{connection} refuses: {header['error']}")
        if "lost" in header:
            connection.losses += 1
            if connection.losses > _LOSSES:
                raise ExchangeError(
                    f"{connection} has lost this worker {_LOSSES} times and taken nothing from it: does it "
                    "end again and again?"
                )
            connection.todo.appendleft(self._joining(connection))
        else:
            request = connection.todo.popleft()
            kind = request.header["kind"]
            if kind == "join":
                self._joined(connection, header)
            elif kind == "push":
                self._count(connection, request.header["number"], messages.field(header, "staleness", int))
            saved = messages.field(header, "saved", int, default=-1)
            while connection.kept and connection.kept[0].header["number"] <= saved:
                connection.kept.popleft()
            connection.answer = header, tensors
        self._send_first(connection)
        return True

    def _joined(self, connection: _Connection, header: Mapping[str, Any]) -> None:
        """Send the initial weights if they are wanted, and the pushes that the shard does not have."""
        connection.limit = messages.field(header, "limit", int)
        if messages.field(header, "seed", bool):
            if connection.seed is None:
                raise ExchangeError(f"{connection} has no weights any more: it was started again without its folder")
            connection.todo.extendleft([self._joining(connection), connection.seed])
            return
        connection.seed = None
        seen = messages.field(header, "seen", int)
        first = connection.kept[0].header["number"] if connection.kept else connection.number + 1
        if seen + 1 < first:
            raise ExchangeError(
                f"{connection} came back with push {seen} of this worker, and had kept them up "
                f"to {first - 1}: its newest snapshot is lost or damaged. Begin again from what this worker has"
            )
        known = [id(request) for request in connection.todo]
        missing = [r for r in connection.kept if r.header["number"] > seen and id(r) not in known]
        connection.todo.extendleft(reversed(missing))

    def _count(self, connection: _Connection, number: int, staleness: int) -> None:
        if number > connection.counted:
            connection.counted, connection.losses = number, 0
            self.staleness[staleness] += 1

    def _late(self, connection: _Connection) -> ExchangeError:
        what = f"{connection} has not answered a {connection.todo[0].header['kind']} for"
        why = (
            f"it says: {connection.why}. Give a longer timeout_seconds if that is to be waited for"
            if connection.why
            else "does it run, is the address right, and is this ticket one of its own? A peer without a key gets no answer"
        )
        return ExchangeError(f"{what} {self.timeout_seconds:g} s: {why}")
