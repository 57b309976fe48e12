"""Local workers, watched: who dies is replaced, and the others are left alone but for being told to meet anew.

The store where groups meet lives here, outside of all workers. A worker says ``join`` when it is in no group; when all who can have
said so, they are sent off in a new one. A worker that joins later has the others called out of their group at their next exchange.
A worker's own error is not a fault of the machine: it ends the run.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from torch._C._distributed_c10d import TCPStore

from noctule.errors import NoctuleError
from noctule.launch.line import Line
from noctule.launch.strategies import Strategy

FUTILE = 3
"""Deaths of one worker in a row, each before it was in a group, after which the run ends."""
_LOOK_SECONDS = 0.1


@dataclass
class Member:
    """A worker's process and what it is doing."""

    number: int
    process: subprocess.Popen[bytes]
    line: Line
    state: Literal["starting", "waiting", "working", "done", "dead"] = "starting"
    since: float = field(default_factory=time.monotonic)
    futile: int = 0
    """Deaths since it was last in a group."""

    def become(self, state: Literal["starting", "waiting", "working", "done", "dead"]) -> None:
        """Note what it does from now on."""
        self.state, self.since = state, time.monotonic()


class Supervisor:
    """Runs a recipe in several processes of this machine until all are done.

    Args:
        run: the run's folder, which says the recipe and its options.
        workers: how many.
        strategy: how they train together.
        threads: of each worker.
        timeout_seconds: after which a silent peer, or a worker that does not come to a meeting, is taken to be lost.
        command: starts a worker; the number of its socket comes last.
    """

    def __init__(
        self,
        run: Path,
        *,
        workers: int,
        strategy: Strategy,
        threads: int,
        timeout_seconds: float = 30.0,
        command: Sequence[str] = (sys.executable, "-m", "noctule.cli", "worker"),
    ) -> None:
        """Nothing is started yet."""
        if workers < 1:
            raise ValueError(f"there has to be at least one worker, got {workers}")
        self.run_folder, self.strategy, self.threads = run, strategy, threads
        self.timeout_seconds, self.command = timeout_seconds, list(command)
        self.workers = workers
        self.generation = 0
        self.lost: list[int] = []
        """The numbers of workers that died, in their order."""
        self.members: list[Member] = []
        self._stopping = False

    def run(self) -> None:
        """Until all workers are done.

        Raises:
            NoctuleError: a worker failed, or cannot be kept alive.
            KeyboardInterrupt: somebody pressed Ctrl-C; the workers have left checkpoints of one step.
        """
        self._store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        before = signal.signal(signal.SIGINT, lambda *_: self._stop())
        try:
            self.members = [self._start(number) for number in range(self.workers)]
            while any(member.state != "done" for member in self.members):
                self._look()
            if self._stopping:
                raise KeyboardInterrupt
        finally:
            signal.signal(signal.SIGINT, before)
            for member in self.members:
                member.process.kill()
                member.process.wait()
                member.line.close()

    def _start(self, number: int, futile: int = 0) -> Member:
        ours, theirs = socket.socketpair()
        folder = self._folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        with theirs, open(folder / "worker.log", "ab") as log:
            process = subprocess.Popen(
                [*self.command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=None if number == 0 else log,
                stderr=None if number == 0 else log,
                start_new_session=True,  # Ctrl-C in a terminal is for us, who then bring all to one step
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
            )
        member = Member(number, process, Line(ours), futile=futile)
        member.line.tell(
            run=str(self.run_folder),
            member=number,
            threads=self.threads,
            strategy=self.strategy.facts(),
            store=self._store.port,
            timeout_seconds=self.timeout_seconds,
        )
        return member

    def _look(self) -> None:
        """Hear who has something to say, see who died, and send off who waits."""
        lines = {member.line.socket: member for member in self.members if not member.line.ended}
        for end in wait(list(lines), _LOOK_SECONDS):
            member = lines[end]  # type: ignore[index]
            for words in member.line.hear():
                self._heard(member, words)
        for member in list(self.members):
            if member.state not in ("done", "dead") and member.process.poll() is not None:
                self._ended(member)
        self._send_off()

    def _heard(self, member: Member, words: dict[str, Any]) -> None:
        if "failed" in words:
            raise NoctuleError(f"worker {member.number}: {words['failed']}")
        if "join" in words:
            member.become("waiting")
            for other in self.members:
                if other.state == "working":
                    other.line.tell(called=True)
        if "done" in words:
            member.become("done")

    def _ended(self, member: Member) -> None:
        for words in member.line.hear() if not member.line.ended else []:
            self._heard(member, words)
        code = member.process.wait()
        if member.state == "done" or code in (0, 130):
            member.become("done")
            return
        if code > 0:
            raise NoctuleError(f"worker {member.number} ended with exit code {code}{self._last_words(member)}")
        if self._stopping:
            member.become("done")
            return
        self.lost.append(member.number)
        futile = member.futile + 1 if member.state != "working" else 1
        name = signal.Signals(-code).name
        if futile > FUTILE:
            raise NoctuleError(
                f"worker {member.number} was ended by {name} {futile} times in a row before it could do anything"
                f"{self._last_words(member)}"
            )
        print(f"worker {member.number} was ended by {name}: it is started again, the others go on", file=sys.stderr)
        member.line.close()
        self.members[member.number] = self._start(member.number, futile)

    def _send_off(self) -> None:
        """A new group of all who wait, once nobody is in the old one; the first group waits for those who are starting."""
        states = [member.state for member in self.members]
        if "waiting" not in states or (not self.generation and "starting" in states):
            return
        late = [member for member in self.members if member.state == "working"]
        waiting = [member for member in self.members if member.state == "waiting"]
        if late:
            if time.monotonic() - max(member.since for member in waiting) > self.timeout_seconds:
                for member in late:  # stopped, or in an endless loop: the others cannot wait for it
                    member.process.kill()
            return
        self.generation += 1
        for rank, member in enumerate(waiting):
            member.line.tell(go=True, rank=rank, world=len(waiting), generation=self.generation, stopped=self._stopping)
            member.become("working")
            member.futile = 0

    def _stop(self) -> None:
        """Bring all workers to one step and end there; a second time, at once."""
        if self._stopping:
            raise KeyboardInterrupt
        self._stopping = True
        for member in self.members:
            member.line.tell(stop=True)

    def _folder(self, number: int) -> Path:
        return self.run_folder if number == 0 else self.run_folder / "workers" / str(number)

    def _last_words(self, member: Member) -> str:
        log = self._folder(member.number) / "worker.log"
        text = log.read_text(errors="replace").splitlines()[-20:] if log.exists() else []
        return ":\n" + "\n".join(text) if text else ""
