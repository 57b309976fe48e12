"""Where Sandblaster's minimiser runs and its portions are handed out; without sockets.

A worker has one request under way: what it found for its last portion, and with it the wish for the next one.
"""

import math
import statistics
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from noctule.checkpoint import Checkpoints
from noctule.core.errors import CheckpointError, ExchangeError
from noctule.parallel.sandblaster.lbfgs import LBFGS, Minimiser, OrderedSum, Vector
from noctule.transport.messages import field, read, write

DTYPES = {"float32": torch.float32, "float64": torch.float64}
_LATE = 1.5
"""A portion that is out for so many times the usual time is given to somebody else too."""
_REMEMBERED = 99
"""Of how many portions the usual time is the median."""
Letter = tuple[bytes, list[bytes]]
"""The route to a worker, and the frames of an answer to it."""


class Portions:
    """One evaluation of the loss: who computes which portion; the first answer of each counts, and none is waited for alone.

    >>> portions = Portions(2, deque([1.0]))
    >>> portions.take("a", 0.0), portions.take("b", 0.0), portions.take("c", 1.0), portions.take("c", 2.0)
    (0, 1, None, 0)
    """

    def __init__(self, count: int, seconds: deque[float]) -> None:
        """So many portions, and how long earlier ones took."""
        self.count, self.seconds = count, seconds
        self.losses: dict[int, float] = {}
        self.sum = OrderedSum(count)
        self._next = 0
        self._out: dict[int, dict[Any, float]] = {}
        """Of a portion that has no answer: who has it since when, the last one last."""

    def take(self, worker: Any, now: float) -> int | None:
        """A portion for a worker that has none: what it lost, a new one, or one that is late elsewhere."""
        portion = next((p for p, copies in self._out.items() if worker in copies), None)
        if portion is None and self._next < self.count:
            portion, self._next = self._next, self._next + 1
        if portion is None:
            waits = {p: now - [*copies.values()][-1] for p, copies in self._out.items()}
            longest = max(waits, key=waits.__getitem__)
            if waits[longest] <= (_LATE * statistics.median(self.seconds) if self.seconds else 0.0):
                return None
            portion = longest
        copies = self._out.setdefault(portion, {})
        copies.pop(worker, None)
        copies[worker] = now
        return portion

    def answer(self, worker: Any, portion: int, loss: float, gradient: Vector, now: float) -> bool:
        """Whether this is the first answer; with the last of them `sum.total` is there."""
        if portion not in self._out:
            return False
        since = self._out.pop(portion).get(worker)
        if since is not None:
            self.seconds.append(now - since)
        self.losses[portion] = loss
        self.sum.add(portion, gradient)
        return True


class _Weights(NamedTuple):
    """As workers get them."""

    version: int
    frame: bytes

    @classmethod
    def of(cls, x: Vector, version: int) -> Self:
        return cls(version, x.whole().numpy().tobytes())


class Coordinator:
    """Reads, checks and answers messages; without sockets.

    Args:
        options: of the minimiser.
        shards: in how many slices vectors lie, each with a thread.
        folder: where the end of each step is kept, from which it goes on; None for nowhere.
        clock: the time in seconds.
    """

    def __init__(
        self,
        options: LBFGS,
        *,
        shards: int = 1,
        folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take up the newest snapshot."""
        if shards < 1:
            raise ValueError(f"vectors lie on at least one shard, got shards={shards}")
        self.options, self.shards, self.now = options, shards, clock
        self.counted: Counter[int] = Counter()
        """How many answers of each worker came first."""
        self.wasted: Counter[int] = Counter()
        """And how many did not, or were too old."""
        self.losses: list[float] = []
        """At the beginning of each step that is done."""
        self.failure: dict[str, Any] = {}
        """What everybody is told when it cannot go on."""
        self.waiting: dict[int, tuple[bytes, dict[str, Any]]] = {}
        self._pool = ThreadPoolExecutor(shards, thread_name_prefix="noctule-shard")  # begins threads when it needs them
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._joined: set[int] = set()
        self._facts: dict[str, str] = {}
        self._dtype, self._portions = "float32", 0
        self._minimiser: Minimiser | None = None
        self._run: Any = None
        self._evaluation: Portions | None = None
        self._weights = self._settled = _Weights(0, b"")
        self._checkpoints = None if folder is None else Checkpoints(folder)
        if self._checkpoints is not None and (found := self._checkpoints.latest()) is not None:
            self._restore(found[1])

    def handle(self, worker: int, route: bytes, frames: Sequence[bytes]) -> list[Letter]:
        """What is to be sent, to this worker and to others that waited."""
        header: dict[str, Any] = {}
        try:
            header, tensors = read(frames)
            kind, serial = field(header, "kind", str), field(header, "serial", int)
            if kind == "join" and self._minimiser is None and worker == 0 and tensors:
                self._seed(header, tensors)
            elif kind not in ("join", "work"):
                raise ExchangeError(f"there is no request {kind!r:.40}: one of join, work")
            elif "did" in header and worker in self._joined:
                self._take_in(worker, field(header, "did", dict), tensors)
        except Exception as error:  # a message never ends the coordinator
            serial = header.get("serial")
            return [(route, write({"serial": serial if type(serial) is int else -1, **_said(error)}))]
        self.waiting[worker] = (route, {name: said for name, said in header.items() if name != "did"})
        letters = self.tick()
        if worker in self.waiting:
            why = "worker 0 has not come with the first weights" if self._minimiser is None else ""
            letters.append((route, write({"serial": serial, "wait": why})))
        return letters

    def tick(self) -> list[Letter]:
        """Whoever waits may have something to do now."""
        letters = []
        for worker, (route, header) in list(self.waiting.items()):
            try:
                answer = self._answer(worker, header)
            except Exception as error:  # nor does what it asks for
                answer = _said(error), []
            if answer is not None:
                del self.waiting[worker]
                letters.append((route, write({"serial": header["serial"], **answer[0]}, answer[1])))
        return letters

    def close(self) -> None:
        """End the threads of the shards."""
        self._pool.shutdown()

    # What is asked for.

    def _seed(self, header: dict[str, Any], tensors: list[bytes]) -> None:
        """Begin with worker 0's weights, where there are none."""
        dtype, portions = field(header, "dtype", str), field(header, "portions", int)
        if dtype not in DTYPES or portions < 1 or len(tensors) != 1 or not tensors[0]:
            raise ExchangeError(f"worker 0 gives {portions} portions and {len(tensors)} vectors of {dtype!r:.40}")
        self._dtype, self._portions, self._facts = dtype, portions, field(header, "facts", dict)
        self._minimiser = Minimiser(self._cut(self._tensor(tensors[0])), self.options)
        self._weights = self._settled = _Weights.of(self._minimiser.x, 0)
        self._save()

    def _join(self, worker: int, facts: Any) -> None:
        theirs = facts if isinstance(facts, dict) else {}
        for name in [*self._facts, *theirs]:
            if self._facts.get(name) != theirs.get(name):
                raise ExchangeError(
                    f"worker {worker} differs from worker 0 in {name!r:.100}: {theirs.get(name, 'not there')!r:.200}, where that "
                    f"one has {self._facts.get(name, 'nothing of that name')!r:.200}. Make the model in the same way on every "
                    "worker, and cut the batch in as many portions"
                )
        self._joined.add(worker)

    def _take_in(self, worker: int, did: dict[str, Any], tensors: list[bytes]) -> None:
        version, portion, loss = field(did, "version", int), field(did, "portion", int), field(did, "loss", float)
        if self.failure:
            return
        if self._evaluation is None or version != self._weights.version or not 0 <= portion < self._portions:
            self.wasted[worker] += 1
            return
        if len(tensors) != 1 or len(tensors[0]) != len(self._weights.frame):
            raise ExchangeError(
                f"worker {worker} sent {sum(map(len, tensors)):,} bytes as the gradient of portion {portion}, and not "
                f"{len(self._weights.frame):,}: did the model change its size after the first step?"
            )
        gradient = self._cut(self._tensor(tensors[0]))
        if not math.isfinite(loss) or not gradient.finite():
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient is not finite, with a loss of {loss:g}"
            self._fail(
                f"portion {portion} at step {len(self.losses)}, computed by worker {worker}: its {what}. All workers have the "
                "weights of the beginning of that step again. Look at that portion of the data, or give LBFGS a smaller lr",
                finite=False,
            )
        elif not self._evaluation.answer(worker, portion, loss, gradient, self.now()):
            self.wasted[worker] += 1
        else:
            self.counted[worker] += 1
            if self._evaluation.sum.total is not None:
                self._advance()

    def _answer(self, worker: int, header: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]] | None:
        """A header and frames, or None as long as there is no answer."""
        if header["kind"] == "work" and worker not in self._joined:
            return {"lost": True}, []
        if self._minimiser is None:
            return ({"seed": True}, []) if worker == 0 else None
        if header["kind"] == "join":
            self._join(worker, header.get("facts"))
            return {}, []
        step, done, weights = field(header, "step", int), len(self.losses), self._settled
        if self.failure:
            said = self.failure
        elif step < done:
            said = {"loss": self.losses[step]}
        elif step > done:
            raise ExchangeError(
                f"worker {worker} is at step {step} and the coordinator at {done}: its newest snapshot is lost. Begin again "
                "from what this worker has"
            )
        else:
            if self._run is None:
                self._run = self._minimiser.step()
                self._advance()
            if self._evaluation is None or (portion := self._evaluation.take(worker, self.now())) is None:
                return None
            said, weights = {"portion": portion}, self._weights
        frames = [] if header.get("has") == weights.version else [weights.frame]
        return {"version": weights.version, **said}, frames

    # Inside.

    def _advance(self) -> None:
        """With the loss and gradient of one point on to the next, or to the end of the step."""
        assert self._minimiser is not None
        done, version = self._evaluation, self._weights.version + 1
        try:
            point = self._run.send(done and (math.fsum(done.losses.values()), done.sum.total))
        except StopIteration as end:
            self.losses.append(end.value)
            self._run = self._evaluation = None
            self._weights = self._settled = _Weights.of(self._minimiser.x, version)
            self._save()
        except Exception as error:  # memory, or numbers near the ends of what floats can hold
            self._fail(f"step {len(self.losses)} cannot go on: {type(error).__name__}: {error}", finite=True)
        else:
            if done is not None:  # where a step begins the weights are out already
                self._weights = _Weights.of(point, version)
            self._evaluation = Portions(self._portions, self._seconds)

    def _fail(self, why: str, *, finite: bool) -> None:
        self.failure, self._run, self._evaluation = {"error": why, "finite": finite}, None, None

    def _tensor(self, frame: bytes) -> Tensor:
        return torch.frombuffer(bytearray(frame), dtype=DTYPES[self._dtype])

    def _cut(self, x: Tensor) -> Vector:
        return Vector.cut(x, self.shards, map if self.shards == 1 else self._pool.map)

    def _save(self) -> None:
        if self._checkpoints is None or self._minimiser is None:
            return
        state = {"facts": self._facts, "dtype": self._dtype, "portions": self._portions, "losses": self.losses}
        state |= {"version": self._settled.version, "minimiser": self._minimiser.state_dict()}
        try:
            self._checkpoints.save(len(self.losses), state)
        except CheckpointError as error:
            warnings.warn(f"{error}; the coordinator goes on without a new snapshot", stacklevel=2)

    def _restore(self, state: dict[str, Any]) -> None:
        self._facts, self._dtype, self._portions = state["facts"], state["dtype"], state["portions"]
        self.losses = state["losses"]
        self._minimiser = Minimiser(self._cut(state["minimiser"]["x"]), self.options)
        self._minimiser.load_state_dict(state["minimiser"], self._cut)
        self._weights = self._settled = _Weights.of(self._minimiser.x, state["version"])


def _said(error: Exception) -> dict[str, str]:
    return {"error": str(error) if isinstance(error, ExchangeError) else f"{type(error).__name__}: {error}"}
