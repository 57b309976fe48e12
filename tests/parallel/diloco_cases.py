"""A small network, batches and exchanges for the tests of `DiLoCo`; and what its workers that are processes do."""

import os
import random
import signal
import threading
import time
from typing import Any

import torch
from torch import Tensor, nn

from exchange_cases import Half
from noctule import ToSparse, convert_
from noctule.core.errors import LostWorkerError
from noctule.core.exchange import Channel, Exchange, Wrapped
from noctule.core.method import attach
from noctule.exchange import AllGather, Compress, own_group
from noctule.parallel import AVERAGE, DiLoCo

_DRAWING = threading.Lock()


def network(*, sparse: bool = False, width: int = 12) -> nn.Module:
    """Four layers, alike also where several threads make them at once."""
    sizes = [6, width, width, width, 3]
    with _DRAWING:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(sizes, sizes[1:], strict=False)]
        model = nn.Sequential(*layers)
        return convert_(model, ToSparse(density=0.4)).model if sparse else model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, start: int, stop: int) -> None:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(1000 * rank + step)
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
        optimizer.zero_grad()
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Told(Exchange):
    """An exchange that says what passes, may be slow, and may be lost at some of its calls before anything is sent."""

    def __init__(self, inner: Exchange, *, slow_seed: int | None = None, lost_at: tuple[int, ...] = ()) -> None:
        self.inner, self.lost_at, self.slow = inner, lost_at, None if slow_seed is None else random.Random(slow_seed)
        self.calls: list[dict[str, Tensor]] = []
        self.totals: list[dict[str, Tensor]] = []
        self.threads: list[threading.Thread] = []
        self.tries = 0

    def __call__(self, tensors: Any, keys: Any) -> list[Tensor]:
        self.tries += 1
        if self.tries in self.lost_at:
            raise LostWorkerError(f"lost at call {self.tries}")
        self.threads.append(threading.current_thread())
        self.calls.append({key: x.clone() for key, x in zip(keys, tensors, strict=True)})
        if self.slow is not None:
            time.sleep(self.slow.random() / 100)
        totals = self.inner(tensors, keys)
        self.totals.append({key: x.clone() for key, x in zip(keys, totals, strict=True)})
        return totals

    def share(self, message: bytes) -> list[bytes]:
        return self.inner.share(message)

    def remapped(self, key: str, remap: Any, shape: tuple[int, ...]) -> None:
        self.inner.remapped(key, remap, shape)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def __repr__(self) -> str:
        return repr(self.inner)


def threads_left() -> list[str]:
    """Names of threads that a session should have ended."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("noctule-diloco")]


# What processes do: each function is given its rank and their number.


def sent_at_each_step(rank: int, world: int, fragments: int, overlap: int, steps: int) -> dict[str, Any]:
    model = network()
    optimizer, path = sgd(model), AllGather(own_group())
    method = DiLoCo(Channel(path=path), every=8, fragments=fragments, overlap=overlap, outer=AVERAGE)
    sent = []
    with attach(model, optimizer, method) as session:
        for step in range(steps):
            train(model, optimizer, rank, step, step + 1)
            method.state_dict()  # waits for what is under way
            sent.append(path.group.sent_bytes)
        session.settle()
    return {"sent": sent, "weights": weights(model), "left": threads_left()}


class Around(Wrapped):
    """A wrapper of a user's own."""

    def __init__(self, inner: Exchange) -> None:
        self._inner = inner

    @property
    def inner(self) -> Exchange:
        return self._inner


def on_everybodys_group(rank: int, world: int) -> list[str]:
    channel, errors = Channel(Compress(Half()), path=AllGather()), []
    for exchange in (channel, Around(channel)):
        try:
            DiLoCo(exchange, every=4, overlap=2)
        except ValueError as error:
            errors.append(str(error))
    return errors


def until_lost(rank: int, world: int) -> dict[str, Any]:
    """Train until another worker is gone, which rank 1 is after its third step."""
    model = network()
    optimizer, path = sgd(model), AllGather(own_group())
    method = DiLoCo(Channel(path=path), every=4, fragments=2, overlap=3, outer=AVERAGE)
    error, started = "", 0.0
    with attach(model, optimizer, method):
        for step in range(100):
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            started = time.monotonic()
            try:
                train(model, optimizer, rank, step, step + 1)
            except LostWorkerError as lost:
                error = str(lost)
                break
    seconds = time.monotonic() - started
    return {"error": error, "steps": method.steps, "seconds": seconds, "left": threads_left()}
