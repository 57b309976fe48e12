"""Exchanges in a thread of their own while training goes on: each is sent after one step, and its result used some steps later."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from noctule.core.exchange import Exchange
from noctule.core.remap import Remap


@dataclass
class PendingExchange:
    """An exchange of some fragments of a model, from the step after which it is sent until its result is used."""

    step: int
    fragments: list[int]
    tensors: dict[str, Tensor]
    """What is sent, by the names of the parameters; once it has arrived, the aggregates."""
    arrived: bool = False
    future: Future[list[Tensor]] | None = None
    """The running exchange: None before it is sent, and after it has arrived or failed."""


class PendingExchanges:
    """A queue of exchanges, made one after the other in the order in which they were added, so alike on all workers.

    Nothing depends on when they end: an error is raised where the result is used, and an exchange that failed is sent again as it
    was, with the ones behind it.

    Args:
        exchange: for which no other use is allowed while an exchange is running: see `wait`.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._queue: list[PendingExchange] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="noctule-diloco")

    def __iter__(self) -> Iterator[PendingExchange]:
        return iter(self._queue)

    @property
    def unsent(self) -> bool:
        """Whether some are to be sent, or to be sent again."""
        return any(not each.arrived and each.future is None for each in self._queue)

    def add(self, pending: PendingExchange) -> None:
        """Add an exchange behind the others; `send` starts it."""
        self._queue.append(pending)

    def send(self) -> None:
        """Start all that are not running."""
        before = None
        for each in self._queue:
            if not each.arrived and each.future is None:
                each.future = self._thread.submit(self._run, dict(each.tensors), before)
            before = each.future

    def take(self, *, sent_by: int) -> Iterator[PendingExchange]:
        """Remove and yield the exchanges sent after this step or before, as they arrive; raises the error of one that failed."""
        while self._queue and self._queue[0].step <= sent_by:
            self._receive(self._queue[0])
            yield self._queue.pop(0)

    def receive(self) -> None:
        """Wait for all, without removing them; raises the error of one that failed."""
        for each in self._queue:
            self._receive(each)

    def wait(self) -> None:
        """Wait for all, and raise nothing: the error of one that failed is raised where its result is used."""
        wait([each.future for each in self._queue if each.future is not None])
        for each in self._queue:
            if each.future is not None and each.future.exception() is None:
                self._receive(each)

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        """Move the numbers of this key, after `wait`; those of a new connection are zero."""
        for each in self._queue:
            if key in each.tensors:
                each.tensors[key] = remap.apply(each.tensors[key].flatten()).view(shape)

    def close(self) -> None:
        """Forget all; the thread ends with the last that was sent, for which other workers may be waiting."""
        self._queue.clear()
        self._thread.shutdown()

    def state_dict(self) -> list[dict[str, Any]]:
        """Wait for all; the results, and what is to be sent again of those that failed."""
        self.wait()
        return [{key: getattr(each, key) for key in _KEPT} for each in self._queue]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Restore what `state_dict` gave."""
        self.wait()
        self._queue = [PendingExchange(**{**kept, "tensors": dict(kept["tensors"])}) for kept in state]

    def _receive(self, pending: PendingExchange) -> None:
        if pending.future is None:
            return
        wait([pending.future])
        if (error := pending.future.exception()) is not None:
            for each in self._queue[self._queue.index(pending) :]:
                each.future = None
            raise error
        pending.tensors = dict(zip(pending.tensors, pending.future.result(), strict=True))
        pending.arrived, pending.future = True, None

    def _run(self, tensors: dict[str, Tensor], before: Future[list[Tensor]] | None) -> list[Tensor]:
        """Exchange, on the thread; behind one that failed, workers would not be at the same exchange any more."""
        if before is not None and (error := before.exception()) is not None:
            raise error
        with torch.no_grad():
            return self._exchange(list(tensors.values()), list(tensors))


_KEPT = ("step", "fragments", "tensors", "arrived")


def check_own_group(exchange: Exchange) -> None:
    """Raise ValueError if an exchange that is to run beside training uses the process group of all processes."""
    everyone = dist.group.WORLD
    if everyone is not None and any(group is everyone for group in exchange.groups()):
        raise ValueError(
            "an exchange that overlaps with training would use the process group of all processes, where others may communicate at "
            "the same time: give the path one of its own, such as TwoPhase(own_group())"
        )
