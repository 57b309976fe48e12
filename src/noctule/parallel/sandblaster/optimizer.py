"""Sandblaster: L-BFGS on a large batch that is cut in many small portions; the next one goes to the next free worker.

Dean et al. 2012, "Large scale distributed deep networks" (Sandblaster L-BFGS), NIPS.
Differs from the paper: each portion's gradient is sent on its own, and all are added in one fixed order, so that the result is the
same in every bit whichever worker computed what; the weights are in one process, not in shards.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from noctule.core.errors import ExchangeError, NonFiniteError
from noctule.parallel.sandblaster.coordinator import DTYPES
from noctule.transport.messages import field, read, write
from noctule.transport.ticket import Ticket

_RETRY_SECONDS, _RETRY_SECONDS_AT_MOST = 1.0, 16.0
"""A request without a reply is sent again, at longer and longer intervals."""


class Sandblaster(Optimizer):
    """An optimizer whose steps are made together: each worker computes portions of the batch until the coordinator ends the step.

    The closure is given the number of a portion, from 0 to ``portions - 1``, and returns the loss of that portion after `backward`.
    The *sum* of the portions' losses is minimised: for a mean, divide by the samples of the whole batch. Every worker makes the
    same number of steps, and must find the same loss for the same portion and weights: the batch may depend on the number of the
    step, and random numbers, as for dropout, on the step and the portion. Then the result is the same, bit for bit, for any number
    of workers, whichever of them is slow, stops, dies or joins later.

    In the first step the model takes the coordinator's weights, which are worker 0's initial ones if it has none. After each step
    every worker has the same weights; other changes of them are overwritten. A step that is completed already returns its loss and
    the newest weights at once, so that a worker that joins late catches up in a moment. Buffers are not shared.

    Args:
        params: all of one dtype, float32 or float64; with `model.named_parameters()` errors name them.
        server: the worker's ticket, from `coordinate`.
        portions: how many the batch is cut in; many times the number of workers.
        timeout_seconds: for any one reply of the coordinator.

    >>> from noctule.parallel import coordinate
    >>> model = nn.Linear(3, 1)
    >>> x = torch.arange(12.0).view(4, 3)
    >>> with coordinate() as server:
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
        super().__init__(params, {"steps": 0})
        if portions < 1:
            raise ValueError(f"a batch is cut in at least one portion, got portions={portions}")
        if len(self.param_groups) != 1:
            raise ValueError("the coordinator has one group of options for all parameters: give them in one group")
        self._dtype = str(self._parameters()[0].dtype).removeprefix("torch.")
        for name, p in zip(self._names(), self._parameters(), strict=True):
            if p.dtype != DTYPES.get(self._dtype):
                raise ValueError(
                    f"parameters are all float32 or all float64, and {name!r} is {p.dtype}: use model.float()"
                )
        from noctule.transport.sockets import Client

        self.server, self.portions, self.timeout_seconds = server, portions, timeout_seconds
        self._version, self._written, self._serial = -1, self._identity(), 0
        self._client = Client(server, server.addresses[0])

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[int], Any]) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take part in one step of the coordinator's optimizer; returns the loss of the whole batch at its beginning.

        Args:
            closure: takes a portion's number; gradients are cleared before it is called, and are those of its loss afterwards.

        Raises:
            NonFiniteError: on all workers, if the loss or gradient of a portion is NaN or infinite; they have the weights of the
                beginning of the step again.
            ExchangeError: the coordinator does not answer, or refuses.
        """
        work: dict[str, Any] = {"kind": "work"}
        tensors: list[bytes] = []
        while True:
            steps = self.param_groups[0]["steps"]
            has = self._version if self._identity() == self._written else -1
            answer, found = self._ask({**work, "step": steps, "has": has}, tensors)
            if answer.get("lost"):  # at the beginning, and where the coordinator was started again
                self._join()
                self._version, tensors = -1, []
                work.pop("did", None)
                continue
            if found:
                self._write(found[0])
                self._version, self._written = field(answer, "version", int), self._identity()
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
        """Disconnect; another worker computes the portion that this one may still have."""
        self._client.close()

    # Inside.

    def _parameters(self) -> list[Tensor]:
        return self.param_groups[0]["params"]

    def _names(self) -> list[str]:
        return self.param_groups[0].get("param_names") or [str(n) for n in range(len(self._parameters()))]

    def _identity(self) -> list[tuple[int, int]]:
        """A value that is another one once the weights have been changed."""
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
        """The reply to a request; while there is none the request is sent again, without its tensors."""
        self._serial += 1
        again = {name: value for name, value in header.items() if name != "did"} | {"serial": self._serial}
        waited, pause, why = 0.0, min(_RETRY_SECONDS, self.timeout_seconds / 4), ""
        self._client.send(write({**header, "serial": self._serial}, tensors))
        while True:
            if (frames := self._client.receive(pause)) is None:
                waited += pause  # and not what the clock says: this process may have been stopped meanwhile
                if waited >= self.timeout_seconds:
                    raise self._late(header, why)
                pause = min(2 * pause, _RETRY_SECONDS_AT_MOST, self.timeout_seconds - waited)
                self._client.send(write(again))
                continue
            answer, found = read(frames)
            if answer.get("serial") != self._serial:
                continue
            if (
                "wait" in answer
            ):  # without a reason there will be work: a portion that is late elsewhere, or the next point
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
                else "does it run, and is this ticket one of its own? A client without a known key gets no answer"
            )
        )


def _frame(tensors: Sequence[Tensor]) -> bytes:
    """The numbers of all tensors as one frame."""
    return torch.cat([(x.to_dense() if x.is_sparse else x).detach().flatten() for x in tensors]).cpu().numpy().tobytes()
