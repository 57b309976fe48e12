"""Worker processes that start in milliseconds: forked from a server that has imported torch, instead of importing it each.

    python -m noctule.core.fork_server DESCRIPTOR MODULE ...

is the server. It has one thread and computes nothing itself, so a forked process is as good as a fresh one. It ends with the
process that started it.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from noctule.core.errors import NoctuleError

_NOT_MINE = "forked by another"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ForkServer:
    """Handle on the server process, which it starts, also anew where it has died.

    Args:
        modules: what the server imports before it forks.
        threads: of OpenMP in each forked process.
    """

    def __init__(self, *modules: str, threads: int = 1) -> None:
        self._modules, self._threads, self._lock = modules, threads, threading.Lock()
        self._start()

    def fork(self, function: str, *arguments: Any, descriptors: Sequence[int] = ()) -> "ForkedProcess":
        """Start a process that calls a function and ends with the status it returns.

        Args:
            function: ``module:name``; it gets the arguments behind a list of the descriptors.
            arguments: what JSON can carry.
            descriptors: of files and sockets that the process is to have, under whatever numbers.
        """
        if not self._alive():
            self._start()
        message = {"function": function, "arguments": arguments}
        return ForkedProcess(self, self.request(message, *descriptors))

    def request(self, message: dict[str, Any], *descriptors: int) -> Any:
        """Send a request and return the reply; NoctuleError if the server has ended."""
        with self._lock, suppress(ConnectionError):
            text = json.dumps(message).encode()
            socket.send_fds(self._socket, [len(text).to_bytes(8, "little")], descriptors)
            self._socket.sendall(text)
            if reply := self._socket.recv(1 << 12):
                return json.loads(reply)
        raise NoctuleError("the process that workers are forked from was ended: start again what was running")

    def close(self) -> None:
        """End the server; processes that it has forked go on."""
        self._socket.close()
        self._process.kill()  # which may be importing
        self._process.wait()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = self._launch(theirs)

    def _launch(self, theirs: socket.socket) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join(filter(None, sys.path))
        return subprocess.Popen(
            [sys.executable, "-m", "noctule.core.fork_server", str(theirs.fileno()), *self._modules],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(self._threads)},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C in a terminal reaches only this process, which then ends the others
        )

    def _alive(self) -> bool:
        return self._process.poll() is None


class ForkedProcess:
    """A process with the methods of `subprocess.Popen`, though it is a child of the server."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended the process; None while it runs."""
        if self.returncode is None:
            with suppress(NoctuleError):
                if (reply := self._server.request({"poll": self.pid})) != _NOT_MINE:
                    self.returncode = reply
                    return reply
            with suppress(ProcessLookupError):  # the server that forked it has ended, and with it the exit code is lost
                os.kill(self.pid, signal.SIGKILL)
            self.returncode = -signal.SIGKILL
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process and return its exit code; subprocess.TimeoutExpired after so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if timeout is not None and deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal unless the process has ended; until `poll` gives an exit code no other process has its pid."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)


def find(path: str) -> Callable[..., Any]:
    """Import the function with the path ``module:name``."""
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def serve(requests: socket.socket) -> NoReturn:
    """Fork a process for each request, and report exit codes, until the socket ends."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # one to all processes of a job: the exit codes are still needed
    while True:
        length, descriptors, _, _ = socket.recv_fds(requests, 8, 16)
        if not length:
            os._exit(0)
        request = json.loads(requests.recv(int.from_bytes(length, "little"), socket.MSG_WAITALL))
        if "poll" in request:
            try:
                process, status = os.waitpid(request["poll"], os.WNOHANG)
                reply = os.waitstatus_to_exitcode(status) if process else None
            except ChildProcessError:
                reply = _NOT_MINE
        elif not (reply := os.fork()):
            requests.close()
            _run(request["function"], descriptors, request["arguments"])
        for descriptor in descriptors:
            os.close(descriptor)
        requests.sendall(json.dumps(reply).encode())


def _run(function: str, descriptors: list[int], arguments: list[Any]) -> NoReturn:
    """Call the function in this new process, and end it."""
    code: Any = 1
    try:
        os.setsid()
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()  # else all forked processes draw the same
        code = find(function)(descriptors, *arguments)
        threading._shutdown()  # type: ignore[attr-defined] as at the end of a main program: waits for threads that are no daemons
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    descriptor, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    serve(socket.socket(fileno=int(descriptor)))
