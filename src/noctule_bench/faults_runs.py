"""A training in processes that can be killed: which processes it has, and which steps they have done."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from types import TracebackType
from typing import Any, Self

from noctule.core.errors import NoctuleError
from noctule_bench import faults_recipe
from noctule_bench.faults_recipe import TRACE, Step

START_SECONDS = 180.0
"""For processes to import torch on a busy machine, and to take part."""
RECIPE = f"{faults_recipe.__file__}:{faults_recipe.training.__name__}"
TORCHRUN = (
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "{workers}",
    "--max-restarts",
    "{restarts}",
    "-m",
)
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
_MARK = "NOCTULE_BENCH_FAULTS"
"""By which all processes of a training are known."""
_LOOK_SECONDS = 0.01
_PAUSE = (0.3, 1.5)


@dataclass(frozen=True)
class Asked:
    """What a fault needs to know."""

    folder: Path
    words: list[str]
    times: int
    workers: int
    random: Random
    link: Any
    frozen_seconds: float
    soak: tuple[float, float, float]

    def pause(self) -> None:
        """Until some moment."""
        time.sleep(self.random.uniform(*_PAUSE))


@dataclass
class Found:
    """What came of a fault."""

    fault: str
    seconds: list[float] = field(default_factory=list)
    """Of each time: from the fault until all go on."""
    lost: int | None = None
    """Steps that were done and had to be done once more, at most."""
    holds: bool = False
    error: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Any]:
        """As a line says them."""
        if self.error is not None:
            return {"row": self.fault, "error": self.error, "holds": False}
        middle, worst = (median(self.seconds), max(self.seconds)) if self.seconds else (None, None)
        about = {"row": self.fault, "times": len(self.seconds), "median_seconds": middle, "worst_seconds": worst}
        return about | {"seconds": self.seconds, "lost": self.lost, "holds": self.holds, **self.more}


class Stuck(NoctuleError):
    """A training does not do what it has to in a time in which it should have; the text says what, and its last words."""


class Running:
    """A training by `noctule run`; at the end of the block nothing of it is left.

    Args:
        folder: where it writes; the run is in ``run`` inside.
        words: options of the recipe.
        workers: how many.
        together: options of the supervisor's; None for torchrun.
        restarts: that torchrun allows.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        *,
        workers: int,
        together: Sequence[str] | None = (),
        restarts: int = 0,
    ) -> None:
        """Start it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.run, self.log, self.workers = folder / "run", folder / "log", workers
        launcher = [] if together is not None else [w.format(workers=workers, restarts=restarts) for w in TORCHRUN]
        several = [] if together is None else ["--workers", str(workers), *together]
        command = [*launcher, "noctule.cli", "run", RECIPE, "--out", str(self.run), "--threads", "1", *words, *several]
        self._mark = f"{_MARK}={folder}".encode()
        environment = {_MARK: str(folder), **_ENVIRONMENT}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._traces = [Tail(self._folder(worker) / TRACE) for worker in range(workers)]

    def _folder(self, worker: int) -> Path:
        return self.run if worker == 0 else self.run / "workers" / str(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        end(self.process.pid)
        for process in self._left():
            end(process)
        self.process.wait()

    def _left(self) -> Iterator[int]:
        """All its processes, orphans too."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended, or is not ours
                if self._mark in path.read_bytes().split(b"\0"):
                    yield int(path.parent.name)

    def children(self) -> list[int]:
        """Its processes, those that they have forked too, oldest first."""
        found, parents = list[int](), [self.process.pid]
        while parents:
            for path in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
                with suppress(OSError):  # it has ended
                    new = [int(pid) for pid in path.read_text().split()]
                    found, parents = found + new, parents + new
        return sorted(found)

    def server(self) -> int | None:
        """The process of the parameter server."""
        for child in self.children():
            with suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text() == "the server\n":
                    return child
        return None

    def steps(self, worker: int) -> list[Step]:
        """What a worker has done so far."""
        return self._traces[worker].read()

    def last(self) -> dict[int, Step]:
        """The last step of each worker that has done one."""
        return {worker: steps[-1] for worker in range(self.workers) if (steps := self.steps(worker))}

    def together(self) -> bool:
        """Whether all workers have done a step in a group of all."""
        last = self.last()
        alive = set(self.children())
        return len(last) == self.workers and all(s.world == self.workers and s.process in alive for s in last.values())

    def until(self, condition: Callable[[], object], what: str, *, seconds: float = START_SECONDS) -> None:
        """Wait for something.

        Raises:
            Stuck: it has not come in so many seconds, or the training has ended.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if (code := self.process.poll()) is not None:
                raise Stuck(f"the training ended with {code} before {what}{self.last_words()}")
            if time.monotonic() > deadline:
                raise Stuck(f"after {seconds:.0f} s still not {what}{self.last_words()}")
            time.sleep(_LOOK_SECONDS)

    def stop(self) -> None:
        """Have all workers stop at one step, as by Ctrl-C.

        Raises:
            Stuck: they do not.
        """
        self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            raise Stuck(f"the training did not stop in {START_SECONDS:.0f} s{self.last_words()}") from None
        if code != 130:
            raise Stuck(f"the training was to stop, and ended with {code}{self.last_words()}")

    def lose_agent(self, *, seconds: float = 10.0) -> float:
        """Kill torchrun's own process, and wait until its workers have ended by themselves; the time when it was killed.

        Raises:
            Stuck: they go on, and would disturb the next training.
        """
        killed = end(self.process.pid)
        self.process.wait()
        while any(self._left()):
            if time.monotonic() - killed > seconds:
                raise Stuck(f"workers still live {seconds:.0f} s after torchrun{self.last_words()}")
            time.sleep(_LOOK_SECONDS)
        return killed

    def last_words(self) -> str:
        """The end of what it has printed."""
        found = ""
        for path in [self.log, *sorted(self.run.glob("workers/*/worker.log"))]:
            lines = path.read_text(errors="replace").replace("\r", "\n").splitlines()
            printed = [line for line in lines if not line.startswith("training ")][-20:]
            found += "".join(f"\n{line}" for line in [f"{path.parent.name}/{path.name}:", *printed] if printed)
        return found


class Tail:
    """The lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        """It may not be there yet."""
        self._path, self._at, self._steps = path, 0, list[Step]()

    def read(self) -> list[Step]:
        """All that are whole."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._at)
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._at += len(whole) + 1
                self._steps += [Step(**json.loads(line)) for line in whole.split(b"\n")]
        return self._steps


def end(process: int) -> float:
    """Kill a process, which may be gone already; the time when."""
    at = time.monotonic()
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    return at


def first(steps: Sequence[Step], condition: Callable[[Step], bool]) -> Step | None:
    """The first step of which something is so."""
    return next((step for step in steps if condition(step)), None)


def off(found: Sequence[Step], undisturbed: Mapping[int, float]) -> float:
    """How far the weights are from those of a training without faults at most, relatively; infinity where a step is missing."""
    return max(
        abs(step.along - undisturbed[step.step]) / (1.0 + abs(undisturbed[step.step]))
        if step.step in undisturbed
        else float("inf")
        for step in found
    )


def differing(traces: Sequence[Sequence[Step]], in_flight: Sequence[tuple[int, int]]) -> int:
    """At how many steps the workers' weights were not the same, bit for bit.

    Args:
        in_flight: process and step of what the killed ones had done last, which the others may have done once more.
    """
    digests: dict[int, set[str]] = {}
    for step in (step for trace in traces for step in trace):
        if step.digest is not None and (step.process, step.step) not in in_flight:
            digests.setdefault(step.step, set()).add(step.digest)
    return sum(len(found) > 1 for found in digests.values())
