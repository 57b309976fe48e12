"""Processes that start in milliseconds: forked from one that has imported torch, instead of importing it each.

    python -m noctule.testing.template DESCRIPTOR

is that one. It has one thread and runs nothing itself, so that its copies are as good as fresh (but all
draw the same from NumPy's global generator), and it ends with the process that started it.
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


class Template:
    """The process that is copied, as seen by the one that started it."""

    def __init__(self) -> None:
        """Start it; it is ready when it answers."""
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "noctule.testing.template", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal is for us, who then end the copies
            )

    @property
    def alive(self) -> bool:
        """Whether it can be copied."""
        return self._process.poll() is None

    def copy(self, plan: Path, channel: socket.socket) -> "Copy":
        """Start a worker with a plan (see `noctule.testing.worker.become`) and its end of a socket."""
        return Copy(self, self.ask({"plan": str(plan)}, channel.fileno()))

    def ask(self, order: dict[str, Any], *descriptors: int) -> Any:
        """Send an order, and return the answer; RuntimeError where there is none."""
        with self._lock, suppress(ConnectionError):
            socket.send_fds(self._socket, [json.dumps(order).encode()], descriptors)
            if said := self._socket.recv(1 << 12):
                return json.loads(said)
        raise RuntimeError(f"the process that workers are copied from has ended ({self._process.wait()}), see stderr")


class Copy:
    """A worker's process; like a `subprocess.Popen`, though it is a child of the template."""

    def __init__(self, template: Template, process: int) -> None:
        """Its template, and its number."""
        self._template, self.pid = template, process
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            try:
                self.returncode = self._template.ask({"poll": self.pid})
            except RuntimeError:  # nobody is left who could know it
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                self.returncode = -signal.SIGKILL
        return self.returncode

    def wait(self) -> int:
        """Wait until it is gone; its exit code."""
        while (code := self.poll()) is None:
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is there: until `poll` gave its exit code nobody else has its number."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def template() -> Template:
    """The template of this process, started when it is first needed."""
    found = _template_of(os.getpid())
    if not found.alive:
        _template_of.cache_clear()
        found = _template_of(os.getpid())
    return found


@functools.lru_cache(maxsize=1)
def _template_of(process: int) -> Template:  # a fork of us has its own
    return Template()


def main() -> None:
    """Fork a worker for each plan, and tell how workers ended, until the socket does."""
    import torch._dynamo  # noqa: F401  (which the first optimizer of a process imports, in a second)

    from noctule.testing import worker  # torch, once

    orders = socket.socket(fileno=int(sys.argv[1]))
    while True:
        said, descriptors, _, _ = socket.recv_fds(orders, 1 << 12, 1)
        if not said:
            os._exit(0)
        order = json.loads(said)
        if "poll" in order:
            process, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if process else None
        elif not (answer := os.fork()):
            orders.close()
            worker.become(Path(order["plan"]), descriptors[0])
        for descriptor in descriptors:
            os.close(descriptor)
        orders.sendall(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
