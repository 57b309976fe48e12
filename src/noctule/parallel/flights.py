"""Exchanges that are under way while training goes on: each is sent after one step, and wanted some steps later."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from noctule.core.exchange import Exchange
from noctule.core.remap import Remap
from noctule.exchange.ddp import process_groups


@dataclass
class Flight:
    """What some fragments of a model send after a step, and then what has come of it."""

    step: int
    fragments: list[int]
    tensors: dict[str, Tensor]
    """By the names of the parameters."""
    arrived: bool = False
    """Whether the tensors are what came."""
    under_way: Future[list[Tensor]] | None = None
    """None before it is sent, and after it has arrived or failed."""


class Flights:
    """Exchanges in a thread of their own, one after the other in the order in which they were added, so alike on all workers.

    Nothing depends on when they end: an error shows where a flight is wanted, and a flight that failed waits, with those behind
    it, to be sent again as it was.

    Args:
        exchange: nobody else uses it while a flight is under way: see `wait`.
    """

    def __init__(self, exchange: Exchange) -> None:
        """There is no thread before there is a flight."""
        self._exchange = exchange
        self._flights: list[Flight] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="noctule-diloco")

    def __iter__(self) -> Iterator[Flight]:
        """Those nobody has taken yet, in their order."""
        return iter(self._flights)

    @property
    def waiting(self) -> bool:
        """Whether some are to be sent, or to be sent again."""
        return any(not flight.arrived and flight.under_way is None for flight in self._flights)

    def add(self, flight: Flight) -> None:
        """Behind the others; `send` is yet to come."""
        self._flights.append(flight)

    def send(self) -> None:
        """Send those that wait."""
        before = None
        for flight in self._flights:
            if not flight.arrived and flight.under_way is None:
                flight.under_way = self._thread.submit(self._fly, dict(flight.tensors), before)
            before = flight.under_way

    def take(self, *, sent_by: int) -> Iterator[Flight]:
        """Those sent after this step or before, as they arrive; the exchange's error where one failed."""
        while self._flights and self._flights[0].step <= sent_by:
            self._receive(self._flights[0])
            yield self._flights.pop(0)

    def receive(self) -> None:
        """Wait for all, without taking them; the exchange's error where one failed."""
        for flight in self._flights:
            self._receive(flight)

    def wait(self) -> None:
        """Wait for all, without a word where one failed: who takes it will hear of it."""
        wait([flight.under_way for flight in self._flights if flight.under_way is not None])
        for flight in self._flights:
            if flight.under_way is not None and flight.under_way.exception() is None:
                self._receive(flight)

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        """The numbers of this key changed their places; `wait` before. A new one has gone nowhere."""
        for flight in self._flights:
            if key in flight.tensors:
                flight.tensors[key] = remap.apply(flight.tensors[key].flatten()).view(shape)

    def close(self) -> None:
        """Forget all; the thread ends with the last that was sent, for which other workers may be waiting."""
        self._flights.clear()
        self._thread.shutdown()

    def state_dict(self) -> list[dict[str, Any]]:
        """What has come of those under way, for which it waits; those that failed, as they are to be sent again."""
        self.wait()
        return [{key: getattr(flight, key) for key in _KEPT} for flight in self._flights]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Take back what `state_dict` gave."""
        self.wait()
        self._flights = [Flight(**{**kept, "tensors": dict(kept["tensors"])}) for kept in state]

    def _receive(self, flight: Flight) -> None:
        if flight.under_way is None:
            return
        wait([flight.under_way])
        if (error := flight.under_way.exception()) is not None:
            for each in self._flights[self._flights.index(flight) :]:
                each.under_way = None
            raise error
        flight.tensors = dict(zip(flight.tensors, flight.under_way.result(), strict=True))
        flight.arrived, flight.under_way = True, None

    def _fly(self, tensors: dict[str, Tensor], before: Future[list[Tensor]] | None) -> list[Tensor]:
        """On the thread; behind one that failed, workers would not be at the same exchange any more."""
        if before is not None and (error := before.exception()) is not None:
            raise error
        with torch.no_grad():
            return self._exchange(list(tensors.values()), list(tensors))


_KEPT = ("step", "fragments", "tensors", "arrived")


def check_own_group(exchange: Exchange) -> None:
    """Raise ValueError if an exchange that is to run beside training speaks on the process group of all processes."""
    everyone = dist.group.WORLD
    if everyone is not None and any(group is everyone for group in process_groups(exchange)):
        raise ValueError(
            "an exchange that overlaps with training would speak on the process group of all processes, where others may speak "
            "at the same time: give the path one of its own, such as TwoPhase(own_group())"
        )
