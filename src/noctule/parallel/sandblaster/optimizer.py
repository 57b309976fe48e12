"""L-BFGS on a large batch that is cut in many small portions: whoever is free computes the next one.

Dean et al. 2012, "Large scale distributed deep networks" (Sandblaster L-BFGS), NIPS.
Differs from the paper: every portion's gradient travels, and all are added up in one fixed order, so that who computed what leaves
no trace in any bit; the shards are threads of one process.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from noctule.core.errors import ExchangeError, NonFiniteError
from noctule.parallel.sandblaster.coordinator import DTYPES, Coordinator
from noctule.parallel.sandblaster.lbfgs import LBFGS
from noctule.transport.messages import field, read, write
from noctule.transport.ticket import Keys, Ticket

_ASK_SECONDS, _ASK_SECONDS_AT_MOST = 1.0, 16.0
"""A request without an answer is sent again, at longer and longer intervals."""


class Sandblaster(Optimizer):
    """A worker's side: computes portions of the batch until the coordinator's step is done.

    The closure is given the number of a portion, from 0 to ``portions - 1``, and returns the loss of that one after `backward`.
    What is minimised is the *sum* of the portions' losses: for a mean divide by the samples of the whole batch. Every worker makes
    as many steps, and must find the same loss for the same portion and weights: the batch may change from step to step, by its
    number, and what is drawn, as for dropout, must be drawn from the portion's number. Then all of it is the same, bit for bit,
    however many workers there are, and whichever of them is slow, stands still, dies or comes later.

    In the first step the model takes the coordinator's weights, which are worker 0's first ones where it has none; after each step
    it has what all have, and what anybody else makes of them meanwhile is overwritten. A step that the others have done already
    gives its loss and the newest weights at once: a worker that comes late, or was held up, has caught up in a moment. Buffers stay
    each worker's own.

    Args:
        params: all of one dtype, float32 or float64; with `model.named_parameters()` errors name them.
        server: the worker's ticket, from `coordinate`.
        portions: in how many the batch is cut; many times the number of workers.
        timeout_seconds: for any one answer, which comes when there is something to do.

    >>> model = nn.Linear(3, 1)
    >>> x = torch.arange(12.0).view(4, 3)
    >>> with coordinate(LBFGS(max_iter=5)) as server:
    ...     optimizer = Sandblaster(model.named_parameters(), server.ticket(0), portions=4)
    ...     def closure(portion):
    ...         loss = (model(x[portion]) - portion).square().sum()
    ...         loss.backward()
    ...         return loss
    ...     first, second = optimizer.step(closure), optimizer.step(closure)
    ...     optimizer.close()
    >>> second < first / 10
    True
    """

    def __init__(self, params: Any, server: Ticket, *, portions: int, timeout_seconds: float = 60.0) -> None:
        """Connect; the first step joins."""
        super().__init__(params, {"steps": 0})
        if portions < 1:
            raise ValueError(f"a batch is cut in at least one portion, got portions={portions}")
        if len(self.param_groups) != 1:
            raise ValueError("L-BFGS has one direction for all parameters: give them in one group")
        self._dtype = str(self._parameters()[0].dtype).removeprefix("torch.")
        for name, p in zip(self._names(), self._parameters(), strict=True):
            if p.dtype != DTYPES.get(self._dtype):
                raise ValueError(
                    f"parameters are all float32 or all float64, and {name!r} is {p.dtype}: use model.float()"
                )
        from noctule.transport.keyed import Caller

        self.server, self.portions, self.timeout_seconds = server, portions, timeout_seconds
        self._version, self._marks, self._serial = -1, self._marked(), 0
        self._caller = Caller(server, server.addresses[0])

    @torch.no_grad()
    def step(self, closure: Callable[[int], Any]) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take part in one step of L-BFGS; the loss of the whole batch where it began.

        Args:
            closure: of a portion's number; gradients are cleared before, and that of the loss is in the parameters after.

        Raises:
            NonFiniteError: on all workers, where the loss or gradient of a portion is NaN or infinite; they have the weights of the
                beginning of the step again.
            ExchangeError: the coordinator does not answer, or refuses.
        """
        work: dict[str, Any] = {"kind": "work"}
        tensors: list[bytes] = []
        while True:
            steps = self.param_groups[0]["steps"]
            has = self._version if self._marked() == self._marks else -1
            answer, found = self._ask({**work, "step": steps, "has": has}, tensors)
            if answer.get("lost"):  # at the beginning, and where the coordinator was started again
                self._join()
                self._version, tensors = -1, []
                work.pop("did", None)
                continue
            if found:
                self._write(found[0])
                self._version, self._marks = field(answer, "version", int), self._marked()
            if "error" in answer:
                raise (ExchangeError if answer["finite"] else NonFiniteError)(answer["error"])
            if "loss" in answer:
                self.param_groups[0]["steps"] = steps + 1
                return field(answer, "loss", float)
            portion = field(answer, "portion", int)
            self.zero_grad()
            with torch.enable_grad():
                loss = torch.as_tensor(closure(portion)).detach().item()
            tensors = [_frame([torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters()])]
            work["did"] = {"version": self._version, "portion": portion, "loss": float(loss)}

    def close(self) -> None:
        """Hang up; what this worker may still have goes to others."""
        self._caller.close()

    # Inside.

    def _parameters(self) -> list[Tensor]:
        return self.param_groups[0]["params"]

    def _names(self) -> list[str]:
        return self.param_groups[0].get("param_names") or [str(n) for n in range(len(self._parameters()))]

    def _marked(self) -> list[tuple[int, int]]:
        """Something else when anybody has changed the weights."""
        return [(id(p), p._version) for p in self._parameters()]

    def _join(self) -> None:
        shapes = {n: f"{self._dtype} {tuple(p.shape)}" for n, p in zip(self._names(), self._parameters(), strict=True)}
        facts = {"portions": str(self.portions), **shapes}
        header = {"kind": "join", "dtype": self._dtype, "portions": self.portions, "facts": facts}
        answer, _ = self._ask(header)
        while answer.get("seed"):
            answer, _ = self._ask(header, [_frame(self._parameters())])

    def _write(self, frame: bytes) -> None:
        parameters = self._parameters()
        sizes, flat = [p.numel() for p in parameters], torch.frombuffer(bytearray(frame), dtype=DTYPES[self._dtype])
        if len(flat) != sum(sizes):
            raise ExchangeError(
                f"{len(flat):,} weights came for {sum(sizes):,}: did the model change its size meanwhile?"
            )
        for p, new in zip(parameters, flat.split(sizes), strict=True):
            p.copy_(new.view_as(p))

    def _ask(self, header: dict[str, Any], tensors: Sequence[bytes] = ()) -> tuple[dict[str, Any], list[bytes]]:
        """The answer to a request, which is sent again, without what was large, as long as none comes."""
        self._serial += 1
        again = {name: said for name, said in header.items() if name != "did"} | {"serial": self._serial}
        waited, pause, why = 0.0, min(_ASK_SECONDS, self.timeout_seconds / 4), ""
        self._caller.send(write({**header, "serial": self._serial}, tensors))
        while True:
            if (frames := self._caller.receive(pause)) is None:
                waited += pause  # and not what the clock says: this process may have been stopped meanwhile
                if waited >= self.timeout_seconds:
                    raise self._late(header, why)
                pause = min(2 * pause, _ASK_SECONDS_AT_MOST, self.timeout_seconds - waited)
                self._caller.send(write(again))
                continue
            answer, found = read(frames)
            if answer.get("serial") != self._serial:
                continue
            if (
                "wait" in answer
            ):  # without a reason something to do will come: a portion that is late elsewhere, or the next point
                why, waited = answer["wait"], waited if answer["wait"] else 0.0
                continue
            if "error" in answer and "finite" not in answer:
                raise ExchangeError(f"the coordinator at {self.server.addresses[0]} refuses: {answer['error']}")
            return answer, found

    def _late(self, header: dict[str, Any], why: str) -> ExchangeError:
        did = header.get("did")
        what = f"its gradient of portion {did['portion']}" if did else f"its request, {header['kind']}"
        return ExchangeError(
            f"worker {self.server.worker} has had no answer to {what}, for {self.timeout_seconds:g} s from the coordinator at "
            f"{self.server.addresses[0]}: "
            + (
                f"it says that {why}"
                if why
                else "does it run, and is this ticket one of its own? Strangers get no answer"
            )
        )


def coordinate(
    options: LBFGS | None = None,
    *,
    shards: int = 1,
    folder: str | Path | None = None,
    host: str = "127.0.0.1",
    max_bytes: int = 1 << 30,
) -> "Coordination":
    """Start what workers with a `Sandblaster` meet at, in threads of this process, until it is closed.

    It holds the weights, the sums of gradients and the history. With a folder it keeps its keys, its address and all it knows at
    the end of each step there, and goes on from that when it is started again with the same one: the step under way is done anew.

    Args:
        options: of L-BFGS.
        shards: in how many slices the vectors lie, each with a thread.
        folder: where it is kept; None for nowhere.
        host: the address of this machine on which workers reach it.
        max_bytes: of one message, which is as large as the weights.

    Raises:
        ExchangeError: the address is taken.
    """
    home = None if folder is None else Path(folder)
    desk = Coordinator(LBFGS() if options is None else options, shards=shards, folder=home and home / "steps")
    return Coordination(desk, home and home / "keys.json", host=host, max_bytes=max_bytes)


class Coordination:
    """A coordinator that listens; `coordinate` makes it."""

    def __init__(self, desk: Coordinator, path: Path | None, *, host: str, max_bytes: int) -> None:
        """Listen."""
        from noctule.transport.keyed import Listener, new_pair

        self._desk, self._keys = desk, Keys(path, pair=new_pair, addresses=[f"tcp://{host}:*"])
        self._listener = Listener(desk, self._keys.addresses[0], self._keys, max_bytes=max_bytes, frames=8)
        self._keys.addresses = self.addresses = (self._listener.address,)
        try:
            self._keys.keep()
        except BaseException:
            self._listener.end()
            raise
        self._listener.start()

    def ticket(self, worker: int) -> Ticket:
        """What a worker needs; the same each time."""
        return self._keys.ticket(worker)

    @property
    def losses(self) -> list[float]:
        """Of the whole batch at the beginning of each step that is done."""
        return list(self._desk.losses)

    @property
    def counted(self) -> Counter[int]:
        """How many portions each worker was the first to answer."""
        return Counter(dict(self._desk.counted))

    @property
    def wasted(self) -> Counter[int]:
        """And how many it computed though another was faster."""
        return Counter(dict(self._desk.wasted))

    def close(self) -> None:
        """End, when all workers are done; a second call does nothing."""
        self._listener.end()
        self._desk.close()

    def __enter__(self) -> Self:
        """This one, which listens already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Where it is; no keys."""
        return f"Coordination({self.addresses[0]})"


def _frame(tensors: Sequence[Tensor]) -> bytes:
    """All their numbers, one after the other."""
    return torch.cat([(x.to_dense() if x.is_sparse else x).detach().flatten() for x in tensors]).cpu().numpy().tobytes()
