"""Growers that look at gradients or activations see what all workers see, and grow what one would grow on the union of batches."""

import copy

import pytest
import torch
from torch import nn

from exchange_cases import together
from noctule import ToSparse, attach, convert_, ctre, gse, rigl
from noctule.core.exchange import Channel
from noctule.exchange import EverySync
from noctule.sparse.layers import SparseLinear
from noctule.sparse.rewire import Rewire

METHODS = {
    "gse": lambda exchange: gse(every=2, seed=1, exchange=exchange),
    "rigl": lambda exchange: rigl(until=100, every=2, seed=1, exchange=exchange),
    "ctre, exact": lambda exchange: ctre(every=2, seed=1, exact=True, exchange=exchange),
    "ctre, sampled": lambda exchange: ctre(every=2, seed=1, exact=False, mode="sim", exchange=exchange),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
    return convert_(model.double(), ToSparse(density=0.3)).model


def train(model: nn.Module, part: slice, rewire: Rewire, *others, steps: int = 5):
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, *others, rewire):
        for _ in range(steps):
            x = torch.randn(12, 12, generator=generator, dtype=torch.float64)
            y = torch.randn(12, 5, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            (model(x[part]) - y[part]).pow(2).mean().backward()
            optimizer.step()
    return model


def places(model: nn.Module) -> list[torch.Tensor]:
    return [layer.topology.keys() for layer in model if isinstance(layer, SparseLinear)]


@pytest.mark.parametrize("name", METHODS)
def test_all_workers_grow_what_one_grows_on_the_union(name):
    models = [network() for _ in range(3)]

    def work(path):
        sync = EverySync(Channel(path=path))
        part = slice(4 * path.rank, 4 * path.rank + 4)
        return train(models[path.rank], part, METHODS[name](Channel(path=path)), sync)

    alone = train(network(), slice(None), METHODS[name](None))
    assert not torch.equal(places(alone)[0], places(network())[0])
    for model in together(3, work):
        for found, right in zip(places(model), places(alone), strict=True):
            assert torch.equal(found, right)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_a_worker_without_a_batch_grows_what_the_others_grow(name):
    models = [network() for _ in range(2)]
    expected = copy.deepcopy(models[0])

    def work(path):
        model, channel = models[path.rank], Channel(path=path)
        optimizer, sync = torch.optim.SGD(model.parameters(), lr=0.1), EverySync(channel)
        with attach(model, optimizer, sync, METHODS[name](Channel(path=path))):
            for _ in range(2):
                optimizer.zero_grad()
                if path.rank:
                    sync.now()
                else:
                    model(torch.ones(3, 12, dtype=torch.float64)).sum().backward()
                optimizer.step()
        return model

    first, second = together(2, work)
    for a, b, before in zip(places(first), places(second), places(expected), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, before)


@pytest.mark.parametrize("name", METHODS)
def test_where_nobody_saw_anything_nothing_moves(name):
    models = [network() for _ in range(2)]
    before = places(network())

    def work(path):
        model = models[path.rank]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with attach(model, optimizer, METHODS[name](Channel(path=path))):
            for _ in range(2):
                optimizer.step()
        return places(model)

    for found in together(2, work):
        assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
