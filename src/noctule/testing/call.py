"""A function that runs in workers: what they answer, or why they do not."""

import json
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from noctule.checkpoint import load
from noctule.core.errors import NoctuleError
from noctule.testing.template import Copy

GRACE_SECONDS = 1.0
"""For the other ranks to be done, or to fail as well, when one has failed."""
_DUMP_SECONDS = 0.3
"""For a process to write down where it is."""
_LOOK_SECONDS = 0.2
"""Between two looks whether a process lives, since children of its own can keep its socket open."""


class WorkerError(NoctuleError):
    """A function failed in a worker, or the worker died or was not done in time; the text says where."""

    def __init__(self, rank: int, kind: str, message: str, details: str = "") -> None:
        """`kind` is the class of the error in the worker, or "died" or "timeout"."""
        super().__init__("\n".join(filter(None, [f"rank {rank}: {kind}: {message}", details.rstrip()])))
        self.rank, self.kind, self.message = rank, kind, message


@dataclass
class Worker:
    """A process, the socket on which it answers, and its place in the group."""

    process: Copy
    channel: socket.socket
    log: Path
    rank: int
    workers: int
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    alive: bool = True
    _begun: bytes = b""

    def tell(self, call: dict[str, Any]) -> None:
        """Send it a call; a dead one gets none, which is found out by who waits for the answer."""
        with suppress(ConnectionError):
            self.channel.sendall((json.dumps(call) + "\n").encode())

    def hear(self) -> None:
        """Take in what it has said, without waiting, and see whether it lives."""
        if not self.alive:
            return
        ended = self.process.poll() is not None
        with suppress(BlockingIOError, ConnectionError):
            while said := self.channel.recv(1 << 16, socket.MSG_DONTWAIT):
                *lines, self._begun = (self._begun + said).split(b"\n")
                for line in lines:
                    answer = json.loads(line)
                    self.answers[answer["number"]] = answer
            ended = True
        if ended:
            self.end()

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        self.alive = False

    def printed(self) -> str:
        """The last lines that it has printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])


class Call:
    """A function that was begun in some workers."""

    def __init__(self, number: int, workers: Mapping[int, Worker]) -> None:
        """Its number, and who runs it."""
        self._number, self._workers = number, dict(workers)
        self._outcomes: dict[int, Any] = {}  # of each rank that is done, in the order in which they were

    def results(self, *, timeout_seconds: float = 60.0) -> list[Any]:
        """Wait for all ranks, and return what they return.

        Raises WorkerError where one fails or dies, with the others' errors in its notes: the others have a second more, then those
        that are still busy are killed. Also where the time is over: see `outcomes`.
        """
        self._wait(timeout_seconds, grace_seconds=GRACE_SECONDS)
        failures = [outcome for outcome in self._outcomes.values() if isinstance(outcome, WorkerError)]
        failures.sort(key=lambda failure: failure.kind != "died")  # what the others say then follows from that
        if failures:
            for other in failures[1:]:
                failures[0].add_note(str(other))
            raise failures[0]
        return [self._outcomes[rank] for rank in self._workers]

    def outcomes(self, *, timeout_seconds: float = 60.0) -> list[Any]:
        """Wait for all ranks, and return what each returns, or its WorkerError.

        Raises WorkerError where the time is over before all are done or dead, with where the busy ones are; they are killed.
        """
        self._wait(timeout_seconds, grace_seconds=float("inf"))
        return [self._outcomes[rank] for rank in self._workers]

    @property
    def done(self) -> list[bool]:
        """Whether each rank has answered or died."""
        busy = self._look()
        return [rank not in busy for rank in self._workers]

    def _wait(self, timeout_seconds: float, *, grace_seconds: float) -> None:
        """Collect the outcomes of all ranks; `grace_seconds` after a failure kill who has none."""
        deadline, failed = time.monotonic() + timeout_seconds, False
        while busy := self._look():
            if not failed and any(isinstance(outcome, WorkerError) for outcome in self._outcomes.values()):
                failed, deadline = True, min(deadline, time.monotonic() + grace_seconds)
            left = deadline - time.monotonic()
            if left > 0:
                wait([worker.channel for worker in busy.values()], min(left, _LOOK_SECONDS))
                continue
            if not failed or grace_seconds == float("inf"):
                raise self._time_out(busy, timeout_seconds)
            for rank, worker in busy.items():
                worker.end()
                self._outcomes[rank] = WorkerError(rank, "killed", "it was still busy after another rank had failed")

    def _look(self) -> dict[int, Worker]:
        """Note the outcomes that there are; who is still busy."""
        for rank, worker in self._workers.items():
            if rank in self._outcomes:
                continue
            worker.hear()
            if answer := worker.answers.pop(self._number, None):
                self._outcomes[rank] = _outcome(rank, answer)
            elif not worker.alive:
                self._outcomes[rank] = WorkerError(rank, "died", _ending(worker.process.wait()), worker.printed())
        return {rank: worker for rank, worker in self._workers.items() if rank not in self._outcomes}

    def _time_out(self, busy: Mapping[int, Worker], timeout_seconds: float) -> WorkerError:
        """Have the busy ones print where they are, and kill them."""
        for worker in busy.values():
            worker.process.send_signal(signal.SIGUSR1)  # faulthandler's
        time.sleep(_DUMP_SECONDS)
        for worker in busy.values():
            worker.end()
        details = [
            f"rank {rank} was at:\n{worker.printed() or 'nothing printed: stopped?'}" for rank, worker in busy.items()
        ]
        who = f"of {len(self._workers)} ranks {sorted(busy)} were not done after {timeout_seconds:g} s, and are killed now"
        return WorkerError(min(busy), "timeout", who, "\n".join(details))


def _outcome(rank: int, answer: dict[str, Any]) -> Any:
    """What an answer says: a value, or an error."""
    if "error" in answer:
        return WorkerError(rank, answer["error"], answer["message"], answer["traceback"])
    if answer.get("result") is None:
        return None
    path = Path(answer["result"])
    result = load(path)
    path.unlink()
    return result


def _ending(code: int) -> str:
    return f"it ended with exit code {code}" if code >= 0 else f"it was ended by {signal.Signals(-code).name}"
