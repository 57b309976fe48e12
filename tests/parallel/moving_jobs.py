"""A sparse network, and servers of processes that are to be killed while its connections move."""

import threading
from collections.abc import Iterable
from typing import Any

import torch
from push_pull_jobs import MOMENTUM, PLAIN, network
from torch import nn

from noctule import SparseLinear
from noctule.core.method import Method
from noctule.core.optim import sparse_layers
from noctule.core.remap import exchange
from noctule.core.topology import Topology
from noctule.parallel.server.listen import serve


def sparse(seed: int = 0, density: float = 0.5) -> Any:
    """6-8-3, each layer with the places and numbers of its seed."""
    generator = torch.Generator().manual_seed(seed)  # threads make models at the same time
    layers = [
        SparseLinear(dense.in_features, dense.out_features, density=density, generator=generator)
        for dense in network(seed)
        if isinstance(dense, nn.Linear)
    ]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def places(model: nn.Module) -> list[Topology]:
    return [layer.topology for layer in sparse_layers(model).values()]


def same(a: nn.Module, b: nn.Module) -> bool:
    """Two models, places and bits."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert places(a) == places(b)
    return all(torch.equal(ours[name], x) for name, x in theirs.items() if isinstance(x, torch.Tensor))


class MoveAt(Method):
    """Moves connections of a layer after given steps, as `Rewire` does."""

    def __init__(self, layer: Any, steps: Iterable[int], seed: int = 0) -> None:
        self.layer, self.steps, self.done, self.seed = layer, set(steps), 0, seed

    def after_step(self) -> None:
        self.done += 1
        if self.done in self.steps:
            move(self.layer, seed=self.seed + self.done)


def move(layer: Any, count: int = 3, seed: int = 0, first: float = 0.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dropped = torch.randperm(layer.weights, generator=generator)[:count]
    grown = layer.topology.missing(count, generator=generator)
    layer.remap_(*exchange(layer.topology, dropped, grown), new=first)


def state_of(model: nn.Module, optimizer: Any) -> Any:
    """Everything that must be alike, as bytes and keys."""
    found = {name: x.clone() for name, x in model.state_dict().items() if isinstance(x, torch.Tensor)}
    for name, p in model.named_parameters():
        found |= {f"{name} {k}": x.clone() for k, x in optimizer.state[p].items() if isinstance(x, torch.Tensor)}
    return found, places(model)


def alike(states: Any) -> bool:
    (first, topologies), *others = states
    return all(
        topologies == theirs
        and found.keys() == first.keys()
        and all(torch.equal(found[n], x) for n, x in first.items())
        for found, theirs in others
    )


def run_server(rank: int, world: int, folder: str, shards: int, workers: int, optimizer: Any = MOMENTUM) -> None:
    """Until this process is killed."""
    torch.set_num_threads(1)
    with serve(optimizer, shards=shards, workers=workers, folder=folder, snapshot_every=7) as server:
        for worker in range(workers):
            server.ticket(worker).save(f"{folder}/worker-{worker}.json")
        threading.Event().wait()


def run_plain_server(rank: int, world: int, folder: str, shards: int, workers: int) -> None:
    """The same, and each push is subtracted from the weights."""
    run_server(rank, world, folder, shards, workers, PLAIN)
