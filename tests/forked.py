"""``noctule ARGS`` in processes of their own that start in milliseconds: forks of one that has imported what they need."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn


class Server:
    """The process that is forked for each command."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def ask(self, order: dict[str, object], *descriptors: int) -> int | None:
        with self._lock:
            said = json.dumps(order).encode()
            socket.send_fds(self._socket, [len(said).to_bytes(4, "little")], descriptors)
            self._socket.sendall(said)
            return json.loads(self._socket.recv(1 << 10))

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


class Command:
    """A running command, with what tests use of `subprocess.Popen`."""

    def __init__(
        self,
        server: Server,
        words: list[str],
        folder: Path,
        environment: Mapping[str, str],
        killed: tuple[int, str] | None = None,
    ) -> None:
        self.args, self._server, self.returncode = ["noctule", *words], server, None
        out, err = os.pipe(), os.pipe()
        self.stdout, self.stderr = os.fdopen(out[0]), os.fdopen(err[0])
        order = {"words": words, "folder": str(folder), "environment": dict(environment), "killed": killed}
        pid = server.ask(order, out[1], err[1])
        assert pid is not None
        self.pid = pid
        os.close(out[1])
        os.close(err[1])
        self._read: dict[str, str] = {}
        self._readers: list[threading.Thread] = []

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.005)
        return code

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
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._read["stdout"], self._read["stderr"]

    def _take(self, name: str) -> None:
        with getattr(self, name) as stream:
            self._read[name] = stream.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve(orders: socket.socket) -> dict[str, object]:
    """Fork for each order, until the socket ends; the order is returned in the fork."""
    while True:
        length, descriptors, _, _ = socket.recv_fds(orders, 4, 2)
        if not length:
            os._exit(0)
        order = json.loads(orders.recv(int.from_bytes(length, "little"), socket.MSG_WAITALL))
        if "poll" in order:
            process, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if process else None
        elif not (answer := os.fork()):
            orders.close()
            for standard, descriptor in zip((1, 2), descriptors, strict=True):
                os.dup2(descriptor, standard)
                os.close(descriptor)
            return order
        for descriptor in descriptors:
            os.close(descriptor)
        orders.sendall(json.dumps(answer).encode())


def become(order: dict[str, object]) -> NoReturn:
    """Run the command of an order in this process."""
    from noctule.cli.main import main

    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.path[0] = order["folder"]
    sys.argv = ["noctule", *order["words"]]
    if order["killed"]:
        die_at_save(*order["killed"])
    sys.exit(main())


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


if __name__ == "__main__":
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # which the first optimizer of a process imports
    import torch.distributed
    import torch.utils.tensorboard  # noqa: F401

    import noctule.cli.start
    import noctule.recipes  # noqa: F401

    become(serve(socket.socket(fileno=int(sys.argv[1]))))
