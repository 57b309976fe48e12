"""A moving average beside a strategy, and the same average made by hand over all places."""

from typing import Any

import torch
from moving_jobs import sparse
from push_pull_jobs import batch, train
from torch import Tensor

from noctule import set_
from noctule.core.method import Method, attach
from noctule.core.optim import sparse_layers
from noctule.parallel import Gossip
from noctule.sparse.average import ExponentialAverage

DECAY = 0.7


class ByHand(Method):
    """The average over all places, cut to those that are there when they change."""

    def begin(self, model, optimizers) -> None:
        self.layers = sparse_layers(model)
        self.average = self._now()

    def after_step(self) -> None:
        for name, now in self._now().items():
            self.average[name] = DECAY * self.average[name] + (1 - DECAY) * now

    def remapped(self, layer, remap) -> None:
        name = next(name for name, own in self.layers.items() if own is layer)
        there = torch.zeros(layer.topology.places, dtype=torch.bool)
        there[layer.topology.keys()] = True
        self.average[name] = self.average[name] * there.view(layer.topology.shape)

    def _now(self) -> dict[str, Tensor]:
        return {name: layer.to_dense().weight.detach().clone() for name, layer in self.layers.items()}


def largest_difference(*methods: Method, rank: int = 0, every: int = 3, moves: bool = True, seed: int = 0) -> float:
    """Between the average of the method and that by hand, after a training with moving connections and other methods."""
    model = sparse(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average, by_hand = ExponentialAverage(DECAY), ByHand()
    with attach(model, optimizer, by_hand, average, *([set_(every=every, seed=1)] if moves else []), *methods):
        train(model, optimizer, [batch(rank, n) for n in range(13)])
    layers: Any = sparse_layers(average.model)
    assert all(layer.topology == model.get_submodule(name).topology for name, layer in layers.items())
    return max(float((layer.to_dense().weight - by_hand.average[name]).abs().max()) for name, layer in layers.items())


def beside_gossip(rank: int, world: int) -> float:
    torch.set_num_threads(1)
    return largest_difference(Gossip(every=3), rank=rank)
