"""A worker's side of what it says to the shards: every request is answered once, through time-outs and restarts.

A request that has no answer is asked after every second, and sent again where the shard does not have it. Pushes that are in no
snapshot yet are kept; a shard that came back from its snapshot gets them again, and applies each once.
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
"""Between two questions after a request, where its time-out is not short."""

_LOSSES = 10
"""A shard that restarts more often without doing anything is given up."""


@dataclass(frozen=True)
class _Request:
    header: Mapping[str, Any]
    tensors: Sequence[bytes] = ()


@dataclass
class _Line:
    """To one shard."""

    shard: int
    address: str
    facts: Mapping[str, str]
    seed: _Request | None
    """The first weights, as long as they may be asked for."""
    todo: deque[_Request] = field(default_factory=deque)
    """The first of them is under way."""
    kept: deque[_Request] = field(default_factory=deque)
    """Pushes and moves that the shard would not have if it ended now."""
    number: int = 0
    """Of the last push or move."""
    counted: int = 0
    """The last push whose staleness is known."""
    serial: int = 0
    """Of what was sent last."""
    under_way: int = -1
    """The serial of the first of `todo`."""
    limit: int = 1 << 62
    answer: tuple[Mapping[str, Any], list[bytes]] = field(default_factory=lambda: ({}, []))
    """To the last request; it may have brought weights."""
    losses: int = 0
    """How many times in a row the shard did not know where this worker is."""
    why: str = ""
    """What the shard said that the request waits for."""


class Links:
    """To all shards.

    Args:
        ticket: where they are, and the keys.
        facts: what all workers must have alike.
        seeds: for each shard the header and the frames of the first weights; of a worker that does not give them, None.
        timeout_seconds: for any one answer.
    """

    def __init__(
        self,
        ticket: Ticket,
        *,
        facts: Mapping[str, str],
        seeds: Sequence[tuple[Mapping[str, Any], Sequence[bytes]] | None],
        timeout_seconds: float,
    ) -> None:
        """Connect and join.

        Raises:
            ExchangeError: a shard does not answer, or has another model.
        """
        from noctule.parallel.server.listen import Wires

        self.timeout_seconds, self.session = timeout_seconds, secrets.token_hex(8)
        self.staleness: Counter[int] = Counter()
        self.lines = [
            _Line(n, address, facts, seed and _Request({"kind": "seed", "facts": facts, **seed[0]}, seed[1]))
            for n, (address, seed) in enumerate(zip(ticket.addresses, seeds, strict=True))
        ]
        self._wires = Wires(ticket)
        self.failed = False
        """Whether it is of no use to say anything more."""
        try:
            for line in self.lines:
                self._begin(line, self._joining(line))
            self.wait()
        except BaseException:
            self._wires.close()
            raise

    def push(
        self, gradients: Sequence[Mapping[str, bytes]], *, pull: bool, versions: Sequence[Mapping[str, int]]
    ) -> None:
        """Send to each shard its gradients and the versions of its places here; with ``pull`` the answers bring the weights."""
        self.wait()
        for line, mine, places in zip(self.lines, gradients, versions, strict=True):
            header = {"kind": "push", "names": list(mine), "pull": pull, "versions": places}
            self._log(line, header, list(mine.values()))

    def move(self, moves: Sequence[tuple[Mapping[str, Any], Sequence[bytes]]]) -> None:
        """Tell each shard which connections have moved; one of which none have hears nothing."""
        self.wait()
        for line, (header, frames) in zip(self.lines, moves, strict=True):
            if frames:
                self._log(line, {"kind": "move", **header}, frames)

    def pull(
        self, versions: Sequence[Mapping[str, int]], *, kept: str = ""
    ) -> list[tuple[Mapping[str, Any], list[bytes]]]:
        """The answer of each shard with its weights: that to the last push, or what it has now.

        Args:
            versions: of the places here.
            kept: what its optimizer keeps under this key is to come too, as it is now.
        """
        self.wait()
        if kept or not all(line.answer[1] for line in self.lines):
            for line, places in zip(self.lines, versions, strict=True):
                self._begin(line, _Request({"kind": "pull", "versions": places, "kept": kept}))
            self.wait()
        found = [line.answer for line in self.lines]
        for line in self.lines:
            line.answer = ({}, [])
        return found

    def forget(self) -> None:
        """Leave answers that were not taken: the next pull asks anew."""
        self.wait()
        for line in self.lines:
            line.answer = ({}, [])

    def wait(self) -> None:
        """Until every request has its answer.

        Raises:
            ExchangeError: one has none after the time-out, or a refusal.
        """
        begun = asked = time.monotonic()
        pause = min(ASK_SECONDS, self.timeout_seconds / 4)
        deadline = asked + self.timeout_seconds
        try:
            while busy := [line for line in self.lines if line.todo]:
                now = time.monotonic()
                if now >= deadline:
                    raise self._late(busy[0])
                if now - asked >= pause:
                    asked = now
                    for line in self.lines:  # those that are done too, so that they know that this worker lives
                        about = line.under_way if line.todo else -1
                        self._send(line, {"kind": "ask", "about": about})
                for shard, frames in self._wires.receive(min(pause, deadline - now)):
                    if self._hear(self.lines[shard], frames):
                        deadline = time.monotonic() + self.timeout_seconds
        except BaseException:
            self.failed = True
            raise
        finally:
            TRAFFIC.seconds += time.monotonic() - begun

    def close(self) -> None:
        """Leave, so that nobody waits for this worker, unless something failed before."""
        try:
            if not self.failed:
                self.wait()
                for line in self.lines:
                    self._begin(line, _Request({"kind": "leave", "number": line.number}))
                self.wait()
        finally:
            self._wires.close()

    # Inside.

    def _joining(self, line: _Line) -> _Request:
        return _Request({"kind": "join", "facts": line.facts})

    def _log(self, line: _Line, header: Mapping[str, Any], frames: Sequence[bytes]) -> None:
        """Send what must be done once, in its order, and may have to be sent again."""
        line.number += 1
        request = _Request({**header, "number": line.number}, frames)
        line.kept.append(request)
        self._begin(line, request)

    def _begin(self, line: _Line, request: _Request) -> None:
        line.todo.append(request)
        self._go_on(line)

    def _go_on(self, line: _Line) -> None:
        """Send the first of what is to be done."""
        if line.todo:
            request = line.todo[0]
            if (size := sum(map(len, request.tensors))) > line.limit:
                self.failed = True
                raise ExchangeError(
                    f"{request.header['kind']} of {size:,} bytes to shard {line.shard} at {line.address}, which takes "
                    f"{line.limit:,}: use more shards, or a server with a larger max_bytes"
                )
            self._send(line, request.header, request.tensors)
            line.under_way = line.serial

    def _send(self, line: _Line, header: Mapping[str, Any], tensors: Sequence[bytes] = ()) -> None:
        line.serial += 1
        frames = messages.write({**header, "session": self.session, "serial": line.serial}, tensors)
        TRAFFIC.sent_bytes += sum(map(len, frames))
        self._wires.send(line.shard, frames)

    def _hear(self, line: _Line, frames: Sequence[bytes]) -> bool:
        """Whether this was an answer to what is under way."""
        header, tensors = messages.read(frames)
        serial = messages.field(header, "serial", int)
        if "waiting" in header:
            if serial > line.under_way and line.todo:
                line.why = str(header.get("why", ""))
                if not header["waiting"]:  # lost on the way, or with the shard
                    self._go_on(line)
            return False
        if not line.todo or serial != line.under_way:
            return False
        line.why = ""
        if "error" in header:
            raise ExchangeError(f"shard {line.shard} at {line.address} refuses: {header['error']}")
        if "lost" in header:
            line.losses += 1
            if line.losses > _LOSSES:
                raise ExchangeError(
                    f"shard {line.shard} at {line.address} has lost this worker {_LOSSES} times and taken nothing from it: does it "
                    "end again and again?"
                )
            line.todo.appendleft(self._joining(line))
        else:
            request = line.todo.popleft()
            kind = request.header["kind"]
            if kind == "join":
                self._joined(line, header)
            elif kind == "push":
                self._count(line, request.header["number"], messages.field(header, "staleness", int))
            saved = messages.field(header, "saved", int, default=-1)
            while line.kept and line.kept[0].header["number"] <= saved:
                line.kept.popleft()
            line.answer = header, tensors
        self._go_on(line)
        return True

    def _joined(self, line: _Line, header: Mapping[str, Any]) -> None:
        """Give the first weights where they are wanted, and the pushes that the shard does not have."""
        line.limit = messages.field(header, "limit", int)
        if messages.field(header, "seed", bool):
            if line.seed is None:
                raise ExchangeError(
                    f"shard {line.shard} at {line.address} has no weights any more: it was started again without its folder"
                )
            line.todo.extendleft([self._joining(line), line.seed])
            return
        line.seed = None
        seen = messages.field(header, "seen", int)
        first = line.kept[0].header["number"] if line.kept else line.number + 1
        if seen + 1 < first:
            raise ExchangeError(
                f"shard {line.shard} at {line.address} came back with push {seen} of this worker, though it had kept those up to "
                f"{first - 1}: its newest snapshot is lost or damaged. Begin again from what this worker has"
            )
        known = [id(request) for request in line.todo]
        missing = [r for r in line.kept if r.header["number"] > seen and id(r) not in known]
        line.todo.extendleft(reversed(missing))

    def _count(self, line: _Line, number: int, staleness: int) -> None:
        if number > line.counted:
            line.counted, line.losses = number, 0
            self.staleness[staleness] += 1

    def _late(self, line: _Line) -> ExchangeError:
        what = f"shard {line.shard} at {line.address} has not answered a {line.todo[0].header['kind']} for"
        why = (
            f"it says: {line.why}. Give a longer timeout_seconds if that is to be waited for"
            if line.why
            else "does it run, is the address right, and is this ticket one of its own? A peer without a key gets no answer"
        )
        return ExchangeError(f"{what} {self.timeout_seconds:g} s: {why}")
