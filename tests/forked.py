"""``noctule ARGS`` in processes of their own that start in milliseconds: forks of one that has imported what they need."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from noctule.core import fork_server

IMPORTS = (
    *("sklearn.datasets", "torch.utils.tensorboard", "torch.distributed", "torch._dynamo"),
    *("matplotlib.figure", "matplotlib.backends.backend_svg"),
    *("noctule.cli.supervised", "noctule.recipes", "forked"),
)


class Command(fork_server.ForkedProcess):
    """A running command, with what tests use of `subprocess.Popen`."""

    def __init__(
        self,
        server: fork_server.ForkServer,
        words: list[str],
        folder: Path,
        environment: Mapping[str, str],
        killed: tuple[int, str] | None = None,
    ) -> None:
        out, err = os.pipe(), os.pipe()
        self.stdout, self.stderr = os.fdopen(out[0]), os.fdopen(err[0])
        theirs = (out[1], err[1])
        arguments = (words, str(folder), dict(environment), killed)
        super().__init__(server, server.fork("forked:become", *arguments, descriptors=theirs).pid)
        for descriptor in theirs:
            os.close(descriptor)
        self._read: dict[str, str] = {}
        self._readers: list[threading.Thread] = []

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left to read of both, when it has ended."""
        if not self._readers:
            for name in ("stdout", "stderr"):
                reader = threading.Thread(target=self._take, args=(name,), daemon=True)
                reader.start()
                self._readers.append(reader)
        self.wait(timeout)
        for reader in self._readers:
            reader.join(timeout)
            if reader.is_alive():  # a child of the command holds the other end
                raise subprocess.TimeoutExpired("noctule", timeout or 0.0)
        return self._read["stdout"], self._read["stderr"]

    def _take(self, name: str) -> None:
        with getattr(self, name) as stream:
            self._read[name] = stream.read()


class Nested(fork_server.ForkServer):
    """The server of a command's own processes: a fork of the command instead of an interpreter that imports all again."""

    def _launch(self, theirs: socket.socket) -> "Forked":
        ours = self._socket
        if pid := os.fork():
            return Forked(pid)
        ours.close()
        os.setsid()
        fork_server.serve(theirs)


class Forked:
    """A fork, with what a server asks of its process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def poll(self) -> int | None:
        return os.waitpid(self._pid, os.WNOHANG)[0] or None

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> None:
        os.waitpid(self._pid, 0)


def become(
    descriptors: list[int],
    words: list[str],
    folder: str,
    environment: dict[str, str],
    killed: tuple[int, str] | None,
) -> int:
    """Run a command in this process, which may kill itself, see `die_at_save`."""
    from noctule.cli.main import main
    from noctule.launch import supervisor

    for standard, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder
    sys.argv = ["noctule", *words]
    supervisor.ForkServer = Nested
    if killed:
        die_at_save(*killed)
    return main()


def die_at_save(number: int, moment: str) -> None:
    """Have this process kill itself at a checkpoint, counted from 1: before it, when it is written but has no name, or after."""
    from noctule.checkpoint import Checkpoints

    save, rename, saves = Checkpoints.save, os.replace, itertools.count(1)

    def die(*_: object) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def save_or_die(self: Checkpoints, step: int, state: object) -> Path:
        if next(saves) < number:
            return save(self, step, state)
        if moment == "before":
            die()
        os.replace = die if moment == "written" else rename
        save(self, step, state)
        die()

    Checkpoints.save = save_or_die


def workers_of(folder: Path) -> list[int]:
    """The processes of a supervisor in a folder by their names: "the server" if there is one, and the workers."""
    found: dict[str, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "comm").read_text().strip()
            if name.startswith(("worker ", "the server")) and (process / "cwd").readlink() == folder:
                found[name] = int(process.name)
        except OSError:  # it has just ended
            continue
    return [found[name] for name in sorted(found)]
