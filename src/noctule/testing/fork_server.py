"""Worker processes that start in milliseconds: forked from a server that has imported torch, instead of importing it each.

    python -m noctule.testing.fork_server DESCRIPTOR

is the server. It has one thread and runs nothing itself, so forked workers are as good as fresh ones (but all
draw the same from NumPy's global generator). It ends with the process that started it.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class ForkServer:
    """Handle on the server process, which it starts; the server is ready when it replies."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "noctule.testing.fork_server", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal reaches only this process, which then ends the workers
            )

    @property
    def alive(self) -> bool:
        """Whether the server process runs."""
        return self._process.poll() is None

    def fork(self, plan: Path, channel: socket.socket) -> "ForkedProcess":
        """Start a worker with a plan (see `noctule.testing.worker.run_worker`) and its end of a socket."""
        return ForkedProcess(self, self.request({"plan": str(plan)}, channel.fileno()))

    def request(self, message: dict[str, Any], *descriptors: int) -> Any:
        """Send a request and return the reply; RuntimeError if the server has ended."""
        with self._lock, suppress(ConnectionError):
            socket.send_fds(self._socket, [json.dumps(message).encode()], descriptors)
            if reply := self._socket.recv(1 << 12):
                return json.loads(reply)
        raise RuntimeError(f"the process that workers are forked from has ended ({self._process.wait()}), see stderr")


class ForkedProcess:
    """A worker's process with the methods of `subprocess.Popen`, though it is a child of the server."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended the process; None while it runs."""
        if self.returncode is None:
            try:
                self.returncode = self._server.request({"poll": self.pid})
            except RuntimeError:  # without its parent the exit code is lost
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                self.returncode = -signal.SIGKILL
        return self.returncode

    def wait(self) -> int:
        """Wait for the end of the process and return its exit code."""
        while (code := self.poll()) is None:
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal unless the process has ended; until `poll` gives an exit code no other process has its pid."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)


def fork_server() -> ForkServer:
    """The server of this process, started on first use and after it died."""
    found = _server_of(os.getpid())
    if not found.alive:
        _server_of.cache_clear()
        found = _server_of(os.getpid())
    return found


@functools.lru_cache(maxsize=1)
def _server_of(process: int) -> ForkServer:  # a forked copy of this process has a server of its own
    return ForkServer()


def main() -> None:
    """Fork a worker for each plan and report exit codes until the socket ends."""
    import torch._dynamo  # noqa: F401  (which the first optimizer of a process imports, in a second)

    from noctule.testing import worker  # torch, once

    requests = socket.socket(fileno=int(sys.argv[1]))
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 12, 1)
        if not message:
            os._exit(0)
        request = json.loads(message)
        if "poll" in request:
            process, status = os.waitpid(request["poll"], os.WNOHANG)
            reply = os.waitstatus_to_exitcode(status) if process else None
        elif not (reply := os.fork()):
            requests.close()
            worker.run_worker(Path(request["plan"]), descriptors[0])
        for descriptor in descriptors:
            os.close(descriptor)
        requests.sendall(json.dumps(reply).encode())


if __name__ == "__main__":
    main()
