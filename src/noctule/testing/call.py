"""A call that runs in worker processes: results, errors, deaths and timeouts."""

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
from noctule.core.fork_server import ForkedProcess

GRACE_SECONDS = 1.0
"""Time that the other ranks have to finish or fail after the first failure."""
_DUMP_SECONDS = 0.3
"""Time that a process has to write its stack to the log."""
_POLL_SECONDS = 0.2
"""Interval of checks whether a process runs; its socket alone does not tell, since its children may hold it open."""


class WorkerError(NoctuleError):
    """Error for a function that failed in a worker, or a worker that died or timed out; the text says where.

    `kind` is the class of the error in the worker, or "died", "timeout" or "killed".
    """

    def __init__(self, rank: int, kind: str, message: str, details: str = "") -> None:
        super().__init__("\n".join(filter(None, [f"rank {rank}: {kind}: {message}", details.rstrip()])))
        self.rank, self.kind, self.message = rank, kind, message


@dataclass
class Worker:
    """A worker process, its socket and its rank in the group."""

    process: ForkedProcess
    channel: socket.socket
    log: Path
    rank: int
    workers: int
    replies: dict[int, dict[str, Any]] = field(default_factory=dict)
    alive: bool = True
    _partial_line: bytes = b""

    def send(self, call: dict[str, Any]) -> None:
        """Send a call; if the worker is dead, nothing happens: waiting for the reply finds out."""
        with suppress(ConnectionError):
            self.channel.sendall((json.dumps(call) + "\n").encode())

    def receive(self) -> None:
        """Read the replies that have arrived, without waiting, and update `alive`."""
        if not self.alive:
            return
        ended = self.process.poll() is not None
        with suppress(BlockingIOError, ConnectionError):
            while received := self.channel.recv(1 << 16, socket.MSG_DONTWAIT):
                *lines, self._partial_line = (self._partial_line + received).split(b"\n")
                for line in lines:
                    reply = json.loads(line)
                    self.replies[reply["number"]] = reply
            ended = True
        if ended:
            self.end()

    def end(self) -> None:
        """Kill the process and wait for its end."""
        self.process.kill()
        self.process.wait()
        self.alive = False

    def log_tail(self) -> str:
        """The last lines of the worker's stdout and stderr."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])


class Call:
    """A pending function call in some workers."""

    def __init__(self, number: int, workers: Mapping[int, Worker]) -> None:
        self._number, self._workers = number, dict(workers)
        self._outcomes: dict[int, Any] = {}  # by rank, in the order in which they arrived

    def results(self, *, timeout_seconds: float = 60.0) -> list[Any]:
        """Wait for all ranks and return their results.

        Raises the WorkerError of a rank that fails or dies, with the errors of the others in its notes: the others have another
        second, then busy ones are killed. Also raises WorkerError at the timeout, as `outcomes` does.
        """
        self._wait(timeout_seconds, grace_seconds=GRACE_SECONDS)
        failures = [outcome for outcome in self._outcomes.values() if isinstance(outcome, WorkerError)]
        failures.sort(key=lambda failure: failure.kind != "died")  # a death explains the errors of the others
        if failures:
            for other in failures[1:]:
                failures[0].add_note(str(other))
            raise failures[0]
        return [self._outcomes[rank] for rank in self._workers]

    def outcomes(self, *, timeout_seconds: float = 60.0) -> list[Any]:
        """Wait for all ranks and return the result or the WorkerError of each.

        Raises WorkerError at the timeout, with the stacks of the busy ranks, which are killed.
        """
        self._wait(timeout_seconds, grace_seconds=float("inf"))
        return [self._outcomes[rank] for rank in self._workers]

    @property
    def done(self) -> list[bool]:
        """Whether each rank has replied or died."""
        busy = self._collect()
        return [rank not in busy for rank in self._workers]

    def _wait(self, timeout_seconds: float, *, grace_seconds: float) -> None:
        """Wait for the outcomes of all ranks; kill the busy ones `grace_seconds` after the first failure."""
        deadline, failed = time.monotonic() + timeout_seconds, False
        while busy := self._collect():
            if not failed and any(isinstance(outcome, WorkerError) for outcome in self._outcomes.values()):
                failed, deadline = True, min(deadline, time.monotonic() + grace_seconds)
            left = deadline - time.monotonic()
            if left > 0:
                wait([worker.channel for worker in busy.values()], min(left, _POLL_SECONDS))
                continue
            if not failed or grace_seconds == float("inf"):
                raise self._time_out(busy, timeout_seconds)
            for rank, worker in busy.items():
                worker.end()
                self._outcomes[rank] = WorkerError(rank, "killed", "it was still busy after another rank had failed")

    def _collect(self) -> dict[int, Worker]:
        """Store the outcomes that have arrived; returns the workers that are still busy."""
        for rank, worker in self._workers.items():
            if rank in self._outcomes:
                continue
            worker.receive()
            if reply := worker.replies.pop(self._number, None):
                self._outcomes[rank] = _outcome(rank, reply)
            elif not worker.alive:
                self._outcomes[rank] = WorkerError(rank, "died", _ending(worker.process.wait()), worker.log_tail())
        return {rank: worker for rank, worker in self._workers.items() if rank not in self._outcomes}

    def _time_out(self, busy: Mapping[int, Worker], timeout_seconds: float) -> WorkerError:
        """Make the error of a timeout from the stacks of the busy workers, and kill them."""
        for worker in busy.values():
            worker.process.send_signal(signal.SIGUSR1)  # faulthandler's
        time.sleep(_DUMP_SECONDS)
        for worker in busy.values():
            worker.end()
        details = [
            f"rank {rank} was at:\n{worker.log_tail() or 'nothing printed: stopped?'}" for rank, worker in busy.items()
        ]
        message = f"of {len(self._workers)} ranks {sorted(busy)} were not done after {timeout_seconds:g} s, and are killed now"
        return WorkerError(min(busy), "timeout", message, "\n".join(details))


def _outcome(rank: int, reply: dict[str, Any]) -> Any:
    """The result or the error in a reply."""
    if "error" in reply:
        return WorkerError(rank, reply["error"], reply["message"], reply["traceback"])
    if reply.get("result") is None:
        return None
    path = Path(reply["result"])
    result = load(path)
    path.unlink()
    return result


def _ending(code: int) -> str:
    return f"it ended with exit code {code}" if code >= 0 else f"it was ended by {signal.Signals(-code).name}"
