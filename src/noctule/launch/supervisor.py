"""Local workers, watched: who dies is replaced, and the others are left alone but for being told to meet anew.

The store where groups meet lives here, outside of all workers. A worker says ``join`` when it is in no group; when all who can
have said so, they are sent off in a new one. A worker that joins later has the others called out of their group before their next
exchange, or after their next meeting. Workers of a parameter server meet nobody: only who dies is started again, the server too. A
worker's own error is not a fault of the machine: it ends the run.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from torch._C._distributed_c10d import TCPStore

from noctule.core.errors import NoctuleError
from noctule.launch.line import Line
from noctule.team.strategy import Strategy
from noctule.train.interrupt import deferred_interrupt

FUTILE = 3
"""Deaths of one process in a row, each before it had done anything, after which the run ends."""
_LOOK_SECONDS = 0.1
_START_SECONDS = 120.0
"""For a server to import torch on a busy machine."""

State = Literal["starting", "waiting", "working", "done"]


@dataclass
class Child:
    """A process and what it is doing."""

    name: str
    process: subprocess.Popen[bytes]
    line: Line
    log: Path
    futile: int = 0
    """Deaths since it last did anything."""
    listening: bool = False
    """Whether it has said a word yet."""
    state: State = "starting"
    since: float = field(default_factory=time.monotonic)

    def become(self, state: State) -> None:
        """Note what it does from now on."""
        self.state, self.since = state, time.monotonic()

    def end(self) -> None:
        """At once, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self.line.close()


class Supervisor:
    """Runs a recipe in several processes of this machine until all are done.

    Args:
        run: the run's folder, which says the recipe and its options.
        workers: how many.
        strategy: how they train together.
        threads: of each worker.
    """

    def __init__(self, run: Path, *, workers: int, strategy: Strategy, threads: int) -> None:
        """Nothing is started yet."""
        if workers < 1:
            raise ValueError(f"there has to be at least one worker, got {workers}")
        self.run_folder, self.strategy, self.threads = run, strategy, threads
        self.workers, self.timeout_seconds = workers, strategy.timeout_seconds
        self.groups = 0
        """How many have been formed."""
        self.lost: list[str] = []
        """Who died, in their order."""
        self.members: list[Child] = []
        self.server: Child | None = None
        self._tickets: list[dict[str, Any]] = []
        self._stopping = False

    def run(self) -> None:
        """Until all workers are done.

        Raises:
            NoctuleError: a worker failed, or cannot be kept alive.
            Stopped: by a signal; the workers have left checkpoints, synchronous ones of one step.
        """
        wait_time = timedelta(seconds=self.timeout_seconds)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait_time)
        try:
            if self.strategy.served:
                self._start_server()
            self.members = [self._start(number) for number in range(self.workers)]
            with deferred_interrupt() as stopping:
                while any(member.state != "done" for member in self.members):
                    if stopping() and not self._stopping:
                        self._stop()
                    self._look()
        finally:
            for member in self.members:
                member.end()
            if self.server is not None:
                self._end_server(self.server)

    # Processes.

    def _spawn(self, name: str, command: str, log_folder: Path, *, shown: bool, futile: int, **plan: Any) -> Child:
        ours, theirs = socket.socketpair()
        log_folder.mkdir(parents=True, exist_ok=True)
        path = log_folder / f"{command}.log"
        with theirs, open(path, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "noctule.cli", "supervised", command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=None if shown else log,
                stderr=None if shown else log,
                start_new_session=True,  # Ctrl-C in a terminal is for us, who then bring all to one step
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
            )
        child = Child(name, process, Line(ours), path, futile)
        child.line.tell(
            **plan, strategy=self.strategy.facts(), workers=self.workers, timeout_seconds=self.timeout_seconds
        )
        return child

    def _start(self, number: int, futile: int = 0) -> Child:
        folder = self.run_folder if number == 0 else self.run_folder / "workers" / str(number)
        return self._spawn(
            f"worker {number}",
            "worker",
            folder,
            shown=number == 0,
            futile=futile,
            run=str(self.run_folder),
            member=number,
            threads=self.threads,
            store=self._store.port,
            ticket=self._tickets[number] if self._tickets else None,
        )

    def _start_server(self, futile: int = 0) -> None:
        folder = self.run_folder / "server"
        server = self._spawn("the server", "server", folder, shown=False, futile=futile, folder=str(folder))
        self.server = server
        if not wait([server.line.socket], _START_SECONDS) or not (said := server.line.hear()):
            raise NoctuleError(f"the parameter server did not start{_last_words(server)}")
        self._tickets = said[0]["tickets"]
        server.become("working")

    def _end_server(self, server: Child) -> None:
        """It keeps everything before it ends."""
        with suppress(OSError):
            server.line.socket.shutdown(socket.SHUT_RDWR)
        try:
            server.process.wait(self.timeout_seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            server.end()

    # What they say and how they end.

    def _look(self) -> None:
        """Hear who has something to say, see who died, and send off who waits."""
        lines = {member.line.socket: member for member in self.members if not member.line.ended}
        for end in wait(list(lines), _LOOK_SECONDS):
            self._hear(lines[end])  # type: ignore[index] wait gives back what it was given
        for number, member in enumerate(self.members):
            if member.state != "done" and member.process.poll() is not None:
                self._ended(number, member)
        if self.server is not None and (code := self.server.process.poll()) is not None:
            futile = self._lost(self.server, code)
            self.server.line.close()
            self._start_server(futile)
        self._send_off()

    def _hear(self, member: Child) -> None:
        for words in member.line.hear():
            member.listening = True
            if "failed" in words:
                raise NoctuleError(f"{member.name}: {words['failed']}")
            if "join" in words:
                member.become("waiting")
                self._call()
            if "left" in words:
                member.become("starting")
            if "done" in words:
                member.become("done")

    def _ended(self, number: int, member: Child) -> None:
        while not member.line.ended:
            self._hear(member)
        code = member.process.wait()
        if member.state == "done" or code in (0, 130) or self._stopping:
            member.become("done")
            return
        futile = self._lost(member, code)
        member.line.close()
        self.members[number] = self._start(number, futile)
        self._call()  # the others may be on their way to a group that waits for it

    def _lost(self, child: Child, code: int) -> int:
        """Note that a process has died; how many times in a row that came to nothing.

        Raises:
            NoctuleError: it ended by an error of its own, or dies again and again.
        """
        if code > 0:
            raise NoctuleError(f"{child.name} ended with exit code {code}{_last_words(child)}")
        futile, name = (0 if child.state == "working" else child.futile) + 1, signal.Signals(-code).name
        if futile > FUTILE:
            raise NoctuleError(
                f"{child.name} was ended by {name} {futile} times before it could do anything{_last_words(child)}"
            )
        print(f"{child.name} was ended by {name}: it is started again, the others go on", file=sys.stderr)
        self.lost.append(child.name)
        return futile

    def _call(self) -> None:
        """Have all who are in a group leave it as soon as no step is half done."""
        for member in self.members:
            if member.state == "working" and not self.strategy.served:
                member.line.tell(called=True)

    def _send_off(self) -> None:
        """A new group of all who wait, once nobody is in the old one; the first one waits for those who are starting, and so does
        one for a merge, which all take part in.
        """
        waiting = [member for member in self.members if member.state == "waiting"]
        working = [member for member in self.members if member.state == "working"]
        everyone = not self.groups or self.strategy.served
        if not waiting or (everyone and any(member.state == "starting" for member in self.members)):
            return
        if working:
            if time.monotonic() - max(member.since for member in waiting) > self.timeout_seconds:
                for member in working:  # stopped, or in an endless loop: the others cannot wait for it
                    member.process.kill()
            return
        self.groups += 1
        for rank, member in enumerate(waiting):
            member.line.tell(go=True, rank=rank, world=len(waiting), group=self.groups, stopped=self._stopping)
            member.become("working")
            member.futile = 0

    def _stop(self) -> None:
        """Bring all workers to one step and end there; who is not in a group yet has nothing to keep."""
        self._stopping = True
        for member in self.members:
            joins_later = member.state == "starting" and not self.strategy.served
            if joins_later or not member.listening or not (self.groups or self.strategy.served):
                member.process.kill()
            member.line.tell(stop=True)


def _last_words(child: Child) -> str:
    text = child.log.read_text(errors="replace").splitlines()[-20:]
    return ":\n" + "\n".join(text) if text else ""
