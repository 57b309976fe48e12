"""A small task, the loops that train on it, and the server of a process that is to be killed."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from noctule.core.method import attach
from noctule.parallel import PushPull
from noctule.parallel.server.listen import serve

MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAGRAD = partial(torch.optim.Adagrad, lr=0.05)
ADAM = partial(torch.optim.Adam, lr=0.01)
PLAIN = partial(torch.optim.SGD, lr=1.0)


def network(seed: int = 0, width: int = 8) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)  # threads make models at the same time
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)


def train(
    model: nn.Module, optimizer: Any, batches: Iterable[tuple[Tensor, Tensor]], after: Callable[[], Any] = int
) -> list[Tensor]:
    for x, y in batches:
        optimizer.zero_grad()
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()
        after()
    return [p.detach().clone() for p in model.parameters()]


def work(method: PushPull, batches: Iterable[tuple[Tensor, Tensor]], after: Callable[[], Any] = int) -> list[Tensor]:
    """The weights of a worker that trains with a server."""
    model = network(seed=method.server.worker)  # each its own: the server's first ones count
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, method):
        return train(model, optimizer, batches, after)


def together(jobs: Iterable[Callable[[], Any]]) -> list[Any]:
    """What each of some threads returns."""
    jobs = list(jobs)
    with ThreadPoolExecutor(len(jobs)) as threads:
        return [done.result() for done in [threads.submit(job) for job in jobs]]


def run_server(rank: int, world: int, folder: str, shards: int, workers: int) -> None:
    """Until this process is killed."""
    torch.set_num_threads(1)
    with serve(MOMENTUM, shards=shards, workers=workers, folder=folder, snapshot_every=7) as server:
        for worker in range(workers):
            server.ticket(worker).save(f"{folder}/worker-{worker}.json")
        threading.Event().wait()
