"""The handler of Sandblaster's coordinator: runs the optimizer, hands out portions and answers workers; without sockets.

A worker has one request pending. It holds the result of the worker's last portion and asks for the next one.
"""

import math
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from noctule.checkpoint import Checkpoints
from noctule.core.errors import CheckpointError, ExchangeError
from noctule.core.finite import all_finite
from noctule.parallel.sandblaster.paused_step import PausedStep
from noctule.parallel.sandblaster.portions import Portions
from noctule.transport.handler import Reply
from noctule.transport.messages import field, read, write

DTYPES = {"float32": torch.float32, "float64": torch.float64}
_REMEMBERED = 99
"""How many durations of portions the usual duration is the median of."""


class _Weights(NamedTuple):
    """The weights as a message holds them."""

    version: int
    frame: bytes

    @classmethod
    def of(cls, x: Tensor, version: int) -> Self:
        return cls(version, x.detach().numpy().tobytes())


class Coordinator:
    """Runs the steps of an optimizer on losses and gradients that workers send.

    Args:
        optimizer: makes the optimizer of a list of parameters, which is one flat vector here.
        folder: where the state after each step is kept, and continued from; None for nowhere.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        *,
        folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.make_optimizer, self.now = optimizer, clock
        self.counted: Counter[int] = Counter()
        """How many results of each worker were the first of their portion."""
        self.wasted: Counter[int] = Counter()
        """How many results of each worker were not the first, or too late."""
        self.losses: list[float] = []
        """The loss at the beginning of each completed step."""
        self.failure: dict[str, Any] = {}
        """The reply to every worker once the optimizer cannot continue; empty until then."""
        self._pending: dict[int, tuple[bytes, dict[str, Any]]] = {}
        """Requests without a reply, by worker: the route and the header."""
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._joined: set[int] = set()
        self._facts: dict[str, str] = {}
        self._dtype, self._portions = "float32", 0
        self._x = nn.Parameter(torch.empty(0))
        self._optimizer: Optimizer | None = None
        self._step: PausedStep | None = None
        self._evaluation: Portions | None = None
        self._weights = self._settled = _Weights(0, b"")
        self._checkpoints = None if folder is None else Checkpoints(folder)
        if self._checkpoints is not None and (found := self._checkpoints.latest()) is not None:
            self._restore(found[1])

    @property
    def busy(self) -> bool:
        """Whether a worker waits."""
        return bool(self._pending)

    def handle(self, worker: int, route: bytes, frames: Sequence[bytes]) -> list[Reply]:
        """Take a request; the replies that can be sent now, to this worker and to others that waited."""
        header: dict[str, Any] = {}
        try:
            header, tensors = read(frames)
            kind, serial = field(header, "kind", str), field(header, "serial", int)
            if kind == "join" and self._optimizer is None and worker == 0 and tensors:
                self._seed(header, tensors)
            elif kind not in ("join", "work"):
                raise ExchangeError(f"there is no request {kind!r:.40}: one of join, work")
            elif "did" in header and worker in self._joined:
                self._take_result(worker, field(header, "did", dict), tensors)
        except Exception as error:  # a message never ends the coordinator
            serial = header.get("serial")
            return [Reply(route, write({"serial": serial if type(serial) is int else -1, **_refusal(error)}))]
        self._pending[worker] = (route, {name: value for name, value in header.items() if name != "did"})
        replies = self.tick()
        if worker in self._pending:
            why = "worker 0 has not come with the first weights" if self._optimizer is None else ""
            replies.append(Reply(route, write({"serial": serial, "wait": why})))
        return replies

    def tick(self) -> list[Reply]:
        """Answer the pending requests that can be answered now."""
        replies = []
        for worker, (route, header) in list(self._pending.items()):
            try:
                answer = self._answer(worker, header)
            except Exception as error:  # nor does what it asks for
                answer = _refusal(error), []
            if answer is not None:
                del self._pending[worker]
                replies.append(Reply(route, write({"serial": header["serial"], **answer[0]}, answer[1])))
        return replies

    def close(self) -> None:
        """Abandon the step that is not completed; the last completed one is in the folder."""
        if self._step is not None:
            self._step.abandon()

    # Requests.

    def _seed(self, header: dict[str, Any], tensors: list[bytes]) -> None:
        """Begin with worker 0's weights."""
        dtype, portions = field(header, "dtype", str), field(header, "portions", int)
        if dtype not in DTYPES or portions < 1 or len(tensors) != 1 or not tensors[0]:
            raise ExchangeError(f"worker 0 gives {portions} portions and {len(tensors)} vectors of {dtype!r:.40}")
        facts = field(header, "facts", dict)
        self._dtype, self._portions, self._facts = dtype, portions, facts
        self._begin(self._tensor(tensors[0]), 0)
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

    def _take_result(self, worker: int, did: dict[str, Any], tensors: list[bytes]) -> None:
        """Check and count the loss and gradient of a portion."""
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
        gradient = self._tensor(tensors[0])
        if not math.isfinite(loss) or not all_finite(gradient):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient is not finite, with a loss of {loss:g}"
            self._fail(
                f"portion {portion} at step {len(self.losses)}, computed by worker {worker}: its {what}. All workers have the "
                "weights of the beginning of that step again. Look at that portion of the data, or give the optimizer a smaller lr",
                finite=False,
            )
        elif not self._evaluation.put(worker, portion, loss, gradient, self.now()):
            self.wasted[worker] += 1
        else:
            self.counted[worker] += 1
            if self._evaluation.total is not None:
                self._advance()

    def _answer(self, worker: int, header: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]] | None:
        """The header and frames of a reply; None while the request has to wait."""
        if header["kind"] == "work" and worker not in self._joined:
            return {"lost": True}, []
        if self._optimizer is None:
            return ({"seed": True}, []) if worker == 0 else None
        if header["kind"] == "join":
            self._join(worker, header.get("facts"))
            return {}, []
        step, done, weights = field(header, "step", int), len(self.losses), self._settled
        if self.failure:
            answer = self.failure
        elif step < done:
            answer = {"loss": self.losses[step]}
        elif step > done:
            raise ExchangeError(
                f"worker {worker} is at step {step} and the coordinator at {done}: its newest snapshot is lost. Begin again "
                "from what this worker has"
            )
        else:
            if self._step is None:
                self._advance()
            if self._evaluation is None or (portion := self._evaluation.take(worker, self.now())) is None:
                return None
            answer, weights = {"portion": portion}, self._weights
        frames = [] if header.get("has") == weights.version else [weights.frame]
        return {"version": weights.version, **answer}, frames

    # Steps.

    def _begin(self, x: Tensor, version: int) -> None:
        self._x = nn.Parameter(x)
        self._optimizer = self.make_optimizer([self._x])
        self._weights = self._settled = _Weights.of(x, version)

    def _advance(self) -> None:
        """Give the optimizer the loss and gradient that it waits for, or begin a step; then evaluate the next point."""
        assert self._optimizer is not None
        done, version = self._evaluation, self._weights.version + 1
        try:
            if self._step is None:
                self._step = PausedStep(self._optimizer, self._x)
            first = self._step.advance(done and done.total)
        except Exception as error:  # memory, or numbers near the ends of what floats can hold
            self._fail(f"step {len(self.losses)} cannot continue: {type(error).__name__}: {error}", finite=True)
            return
        if first is None:
            if done is not None:  # where a step begins the workers have the weights already
                self._weights = _Weights.of(self._x, version)
            self._evaluation = Portions(self._portions, self._seconds)
        else:
            self.losses.append(first)
            self._step = self._evaluation = None
            self._weights = self._settled = _Weights.of(self._x, version)
            self._save()

    def _fail(self, why: str, *, finite: bool) -> None:
        self.close()
        self.failure, self._step, self._evaluation = {"error": why, "finite": finite}, None, None

    def _tensor(self, frame: bytes) -> Tensor:
        return torch.frombuffer(bytearray(frame), dtype=DTYPES[self._dtype])

    def _save(self) -> None:
        if self._checkpoints is None or self._optimizer is None:
            return
        state = {"facts": self._facts, "dtype": self._dtype, "portions": self._portions, "losses": self.losses}
        state |= {"version": self._settled.version, "x": self._x.detach(), "optimizer": self._optimizer.state_dict()}
        try:
            self._checkpoints.save(len(self.losses), state)
        except CheckpointError as error:
            warnings.warn(f"{error}; the coordinator continues without a new snapshot", stacklevel=2)

    def _restore(self, state: dict[str, Any]) -> None:
        if "optimizer" not in state:
            raise ExchangeError("the coordinator's folder was written by an earlier version of noctule: use a new one")
        self._facts, self._dtype, self._portions = state["facts"], state["dtype"], state["portions"]
        self.losses = state["losses"]
        self._begin(state["x"], state["version"])
        assert self._optimizer is not None
        options = self._optimizer.state_dict()["param_groups"]  # the ones given now, which may differ
        self._optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": options})


def _refusal(error: Exception) -> dict[str, str]:
    return {"error": str(error) if isinstance(error, ExchangeError) else f"{type(error).__name__}: {error}"}
