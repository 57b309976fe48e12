"""Run functions in fresh processes that form a torch.distributed group, on one machine or over a shaped link.

Functions lie in modules, get their rank and the number of workers first, and take and return plain values and tensors:

    def mean(rank, workers, x):
        dist.all_reduce(x)
        return x / workers

    assert run_workers(mean, workers=2, arguments=[torch.ones(3)])[0].sum() == 3

`Workers` stay from call to call, and take part in scripted faults:

    with Workers(2, network=network) as workers:
        running = workers.begin(train, 1000)
        workers.kill(1)
        survivor, victim = running.outcomes()

They are forked after the import of torch; `noctule.measure.turns`, which times other libraries too, starts fresh interpreters.
"""

import functools
import itertools
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from noctule.checkpoint import save
from noctule.core.fork_server import ForkServer
from noctule.testing.call import Call, Worker, WorkerError
from noctule.testing.link import Network
from noctule.testing.worker import STARTED, run_worker

__all__ = ["Call", "WorkerError", "Workers", "run_workers"]

START_SECONDS = 120.0
"""Timeout of a start: a process may have to import torch on a busy machine."""
Function = str | Callable[..., Any]
"""A function at the top of a module, or its path ``"module:name"``; it is called with (rank, workers, *arguments)."""


@functools.lru_cache(maxsize=1)
def fork_server(process: int) -> ForkServer:
    """The server of a process, started on first use; a forked copy of this process has one of its own."""
    return ForkServer(
        "noctule.testing.worker", "torch._dynamo"
    )  # which the first optimizer of a process imports, in a second


def run_workers(
    function: Function,
    workers: int = 2,
    *,
    arguments: Sequence[Any] = (),
    network: Network | None = None,
    timeout_seconds: float = 60.0,
    threads: int = 1,
) -> list[Any]:
    """Call a function once in each of some fresh processes that form a gloo group; return the results by rank.

    Args:
        function: see `Function`.
        workers: how many processes.
        arguments: plain values and tensors, as in a checkpoint; so are the results.
        network: a namespace for each process; None for this machine's loopback.
        timeout_seconds: of the call, and of every collective in it.
        threads: of each process.

    Raises WorkerError where a process fails, dies or times out.
    """
    with Workers(workers, network=network, threads=threads, group_timeout_seconds=timeout_seconds) as group:
        return group.call(function, *arguments, timeout_seconds=timeout_seconds)


class Workers:
    """Worker processes that stay from call to call and can be killed, stopped and started again.

    The arguments are those of `run_workers`. All processes form a gloo group, or none with ``group=False``.

    Raises ValueError for more workers than the network has namespaces, WorkerError where a process does not start.
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        network: Network | None = None,
        threads: int = 1,
        group: bool = True,
        group_timeout_seconds: float = 60.0,
    ) -> None:
        places = len(network.namespaces) if network else workers
        if not 1 <= workers <= places:
            raise ValueError(
                f"workers={workers}: there have to be some, and no more than the network's {places} places"
            )
        self.network, self.threads, self.group_timeout_seconds = network, threads, group_timeout_seconds
        self._folder = tempfile.TemporaryDirectory(prefix="noctule-workers-")
        self._numbers = itertools.count()
        self._port = _free_port()
        self._workers: list[Worker] = []
        try:
            for rank in range(workers):
                self._workers.append(self._spawn(rank, workers))
            self._await_start(range(workers))
            if group:
                self.form_group()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Kill all processes."""
        for worker in self._workers:
            worker.end()
            worker.channel.close()
        self._folder.cleanup()

    @property
    def alive(self) -> list[int]:
        """The ranks whose process runs, stopped and busy ones included."""
        return [rank for rank, worker in enumerate(self._workers) if worker.process.poll() is None]

    def call(
        self, function: Function, *arguments: Any, ranks: Sequence[int] | None = None, timeout_seconds: float = 60.0
    ) -> list[Any]:
        """Call a function in every living process, or in those of `ranks`, and return the results in their order.

        Raises WorkerError where a process fails, dies or times out: see `Call.results`.
        """
        return self.begin(function, *arguments, ranks=ranks).results(timeout_seconds=timeout_seconds)

    def begin(self, function: Function, *arguments: Any, ranks: Sequence[int] | None = None) -> Call:
        """Begin a call and return it while it runs; a process runs its calls one after another.

        Raises ValueError where no worker is alive, or the function cannot be imported by another process.
        """
        ranks = self.alive if ranks is None else ranks
        if not ranks:
            raise ValueError("there is no living worker to call: start one")
        number, path = next(self._numbers), _path(function)
        given = Path(self._folder.name, f"{number}.safetensors")
        save(given, list(arguments))
        for rank in ranks:
            worker, result = self._workers[rank], Path(self._folder.name, f"{number}-{rank}.safetensors")
            call = {"number": number, "function": path, "arguments": str(given), "result": str(result)}
            worker.send({**call, "rank": worker.rank, "workers": worker.workers})
        return Call(number, {rank: self._workers[rank] for rank in ranks})

    def form_group(self, ranks: Sequence[int] | None = None) -> None:
        """Form a new gloo group of the living processes, or of `ranks`, in place of the old one, and number them anew.

        Raises WorkerError where that fails.
        """
        ranks = self.alive if ranks is None else ranks
        for place, rank in enumerate(ranks):
            self._workers[rank].rank, self._workers[rank].workers = place, len(ranks)
        store = Path(self._folder.name, f"store-{next(self._numbers)}")
        form = "noctule.testing.worker:form_group"
        self.call(form, str(store), self.group_timeout_seconds, ranks=ranks, timeout_seconds=START_SECONDS)

    def kill(self, rank: int) -> None:
        """Kill a process (SIGKILL) and wait for its end."""
        self._workers[rank].receive()  # replies sent before the kill count
        self._workers[rank].end()

    def stop(self, rank: int) -> None:
        """Suspend a process (SIGSTOP): to its peers it is connected but silent."""
        self._workers[rank].process.send_signal(signal.SIGSTOP)

    def resume(self, rank: int) -> None:
        """Continue a stopped process (SIGCONT)."""
        self._workers[rank].process.send_signal(signal.SIGCONT)

    def start(self, rank: int) -> None:
        """Start a new process for the rank of a dead one; it is in no group until `form_group`.

        Raises ValueError where the old process still runs, WorkerError where the new one does not start.
        """
        if rank in self.alive:
            raise ValueError(f"rank {rank} is running; kill it before it is started again")
        self._workers[rank].channel.close()
        self._workers[rank] = self._spawn(rank, len(self._workers))
        self._await_start([rank])

    def _await_start(self, ranks: Sequence[int]) -> None:
        Call(STARTED, {rank: self._workers[rank] for rank in ranks}).results(timeout_seconds=START_SECONDS)

    def _spawn(self, rank: int, workers: int) -> Worker:
        name = f"{rank}-{next(self._numbers)}"
        log = Path(self._folder.name, f"{name}.log")
        log.touch()
        setup = {
            "environment": self._environment(rank, workers),
            "folder": os.getcwd(),
            "path": sys.path,
            "log": str(log),
            "threads": self.threads,
            "namespace": self.network and self.network.namespaces[rank],
        }
        ours, theirs = socket.socketpair()
        with theirs:
            process = fork_server(os.getpid()).fork(
                f"{run_worker.__module__}:run_worker", setup, descriptors=[theirs.fileno()]
            )
            return Worker(process, ours, log, rank, workers)

    def _environment(self, rank: int, workers: int) -> dict[str, str]:
        """Environment variables of a process, with those that a group made by the caller's own code reads."""
        alone = {
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._port),
        }
        return {
            **os.environ,
            **(self.network.environment(rank) if self.network else alone),
            "RANK": str(rank),
            "WORLD_SIZE": str(workers),
            "OMP_NUM_THREADS": str(self.threads),
        }


def _path(function: Function) -> str:
    """The path by which another process imports a function."""
    if isinstance(function, str):
        if ":" not in function:
            raise ValueError(f"{function!r} names no function: write 'package.module:function'")
        return function
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise ValueError(
            f"{function.__qualname__} cannot be imported by another process: put it at the top of a module"
        )
    return f"{function.__module__}:{function.__qualname__}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
