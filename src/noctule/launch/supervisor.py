"""A supervisor of worker processes on this machine: it restarts those that die and forms groups of those that live.

The store where groups meet is in this process, outside of all workers. A worker sends ``join`` when it is in no group. Once all
workers that can have sent it, each gets ``go`` with its rank in a new group. When a worker joins later, the others get ``called``
and leave their group before the next exchange, or after the next meeting. Workers of a server form no groups: a process that dies
is restarted, be it a worker or the server. An error that a worker raises itself ends the run.
"""

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
from noctule.core.fork_server import ForkedProcess, ForkServer
from noctule.launch.connection import Connection
from noctule.team.strategy import ServedStrategy, Strategy
from noctule.train.interrupt import deferred_interrupt

PROCESS = "noctule.cli.supervised:start"
"""The function of a process of the supervisor."""
IMPORTS = ("noctule.cli.start", "noctule.recipes", "torch._dynamo")
"""What each process would import: the first optimizer of a process imports torch._dynamo, in a second."""
FUTILE = 3
"""The deaths of one process in a row, each before it had worked, after which the run ends."""
_POLL_SECONDS = 0.1
_START_SECONDS = 120.0
"""The time that a server has to import torch on a busy machine."""

State = Literal["starting", "waiting", "working", "done"]


@dataclass
class Child:
    """A process and its state."""

    name: str
    process: ForkedProcess
    connection: Connection
    log: Path
    futile: int = 0
    """The number of deaths since it last worked."""
    listening: bool = False
    """Whether it has sent a message yet."""
    state: State = "starting"
    since: float = field(default_factory=time.monotonic)

    def become(self, state: State) -> None:
        """Change the state, from now on."""
        self.state, self.since = state, time.monotonic()

    def end(self) -> None:
        """Kill the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


class Supervisor:
    """Runs a recipe in several processes of this machine until all are done.

    Args:
        run: the run's folder, which says the recipe and its options.
        workers: how many there are.
        strategy: how they train together.
        threads: of each worker.
    """

    def __init__(self, run: Path, *, workers: int, strategy: Strategy, threads: int) -> None:
        if workers < 1:
            raise ValueError(f"there has to be at least one worker, got {workers}")
        self.run_folder, self.strategy, self.threads = run, strategy, threads
        self.workers, self.timeout_seconds = workers, strategy.timeout_seconds
        self.groups = 0
        """How many groups have been formed."""
        self.lost: list[str] = []
        """The names of the processes that died, in order."""
        self.members: list[Child] = []
        self.server: Child | None = None
        self._tickets: list[dict[str, Any]] = []
        self._served = isinstance(strategy, ServedStrategy)
        self._stopping = False
        self._forks = ForkServer(PROCESS.partition(":")[0], *IMPORTS, threads=threads)

    def run(self) -> None:
        """Run until all workers are done.

        Raises:
            NoctuleError: a worker failed, or dies again and again.
            Stopped: a signal came; the workers have left checkpoints, those of a group of one step.
        """
        wait_time = timedelta(seconds=self.timeout_seconds)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait_time)
        try:
            if self._served:
                self._start_server()
            self.members = [self._start(number) for number in range(self.workers)]
            with deferred_interrupt() as stopping:
                while any(member.state != "done" for member in self.members):
                    if stopping() and not self._stopping:
                        self._stop()
                    self._poll()
        finally:
            for member in self.members:
                member.end()
            if self.server is not None:
                self._end_server(self.server)
            self._forks.close()

    # Processes.

    def _spawn(self, name: str, command: str, log_folder: Path, *, shown: bool, futile: int, **plan: Any) -> Child:
        ours, theirs = socket.socketpair()
        log_folder.mkdir(parents=True, exist_ok=True)
        path = log_folder / f"{command}.log"
        with theirs, open(path, "ab") as log:
            descriptors = [theirs.fileno()] if shown else [theirs.fileno(), log.fileno()]
            process = self._forks.fork(PROCESS, command, name, descriptors=descriptors)
        child = Child(name, process, Connection(ours), path, futile)
        child.connection.send(
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
        if not wait([server.connection.socket], _START_SECONDS) or not (messages := server.connection.receive()):
            raise NoctuleError(f"the server did not start{_last_words(server)}")
        self._tickets = messages[0]["tickets"]
        server.become("working")

    def _end_server(self, server: Child) -> None:
        """Close the connection, which has the server keep everything and end."""
        with suppress(OSError):
            server.connection.socket.shutdown(socket.SHUT_RDWR)
        try:
            server.process.wait(self.timeout_seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            server.end()

    # Their messages and their ends.

    def _poll(self) -> None:
        """Receive messages, notice deaths, and form a group of the workers that wait."""
        connections = {member.connection.socket: member for member in self.members if not member.connection.ended}
        for end in wait(list(connections), _POLL_SECONDS):
            self._receive(connections[end])  # type: ignore[index] wait gives back what it was given
        for number, member in enumerate(self.members):
            if member.state != "done" and member.process.poll() is not None:
                self._ended(number, member)
        if self.server is not None and (code := self.server.process.poll()) is not None:
            futile = self._lost(self.server, code)
            self.server.connection.close()
            self._start_server(futile)
        self._form_group()

    def _receive(self, member: Child) -> None:
        for message in member.connection.receive():
            member.listening = True
            if "failed" in message:
                raise NoctuleError(f"{member.name}: {message['failed']}")
            if "join" in message:
                member.become("waiting")
                self._request_regroup()
            if "left" in message:
                member.become("starting")
            if "done" in message:
                member.become("done")

    def _ended(self, number: int, member: Child) -> None:
        while not member.connection.ended:
            self._receive(member)
        code = member.process.wait()
        if member.state == "done" or code in (0, 130) or self._stopping:
            member.become("done")
            return
        futile = self._lost(member, code)
        member.connection.close()
        self.members[number] = self._start(number, futile)
        self._request_regroup()  # the others may be on their way to a group that waits for it

    def _lost(self, child: Child, code: int) -> int:
        """Note the death of a process; return how often in a row it died before it had worked.

        Raises:
            NoctuleError: it ended with an error of its own, or dies again and again.
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

    def _request_regroup(self) -> None:
        """Have all workers in a group leave it as soon as no step is half done."""
        for member in self.members:
            if member.state == "working" and not self._served:
                member.connection.send(called=True)

    def _form_group(self) -> None:
        """Form a group of all workers that wait, once none is in the old one.

        The first group also waits for workers that are starting, and so does a group for a merge, in which all take part.
        """
        waiting = [member for member in self.members if member.state == "waiting"]
        working = [member for member in self.members if member.state == "working"]
        everyone = not self.groups or self._served
        if not waiting or (everyone and any(member.state == "starting" for member in self.members)):
            return
        if working:
            if time.monotonic() - max(member.since for member in waiting) > self.timeout_seconds:
                for member in working:  # stopped, or in an endless loop: the others cannot wait for it
                    member.process.kill()
            return
        self.groups += 1
        for rank, member in enumerate(waiting):
            member.connection.send(go=True, rank=rank, world=len(waiting), group=self.groups, stopped=self._stopping)
            member.become("working")
            member.futile = 0

    def _stop(self) -> None:
        """Have all workers stop at one step; a worker that was in no group yet has nothing to keep, and is killed."""
        self._stopping = True
        for member in self.members:
            joins_later = member.state == "starting" and not self._served
            if joins_later or not member.listening or not (self.groups or self._served):
                member.process.kill()
            member.connection.send(stop=True)


def _last_words(child: Child) -> str:
    text = child.log.read_text(errors="replace").splitlines()[-20:]
    return ":\n" + "\n".join(text) if text else ""
