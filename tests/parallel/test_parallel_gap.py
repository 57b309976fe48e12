"""GaP on several workers: layers come from the worker that grew them, masked and sparse layers do the same, and all end alike."""

import copy

import pytest
import torch
from torch import nn

from exchange_cases import together
from noctule import ToSparse, convert_
from noctule.core.errors import ExchangeError
from noctule.core.exchange import Channel
from noctule.core.method import attach
from noctule.parallel import ParallelGaP

WORKERS, EVERY, ROUNDS = 3, 4, 2
UNTIL = EVERY * ROUNDS + 1


def network(*, sparse: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))
    if not sparse:
        return model
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    convert_(model, ToSparse(density=1.0))
    for name in ("0", "2", "4"):
        values = {"values": dense[f"{name}.weight"].flatten(), "bias": dense[f"{name}.bias"]}
        model.get_submodule(name).load_state_dict({**model.get_submodule(name).state_dict(), **values})
    return model


def gap(path, **options) -> ParallelGaP:
    options = {"density": 0.25, "every": EVERY, "rounds": ROUNDS, **options}
    return ParallelGaP(Channel(path=path), worker=path.rank, workers=WORKERS, **options)


def train(model, optimizer, rank, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * rank + step)
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
        optimizer.zero_grad()
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()


def dense_weights(model):
    return [(m.to_dense() if hasattr(m, "topology") else m).weight.detach() for m in model if hasattr(m, "bias")]


def trained(*, sparse):
    models, between = [network(sparse=sparse) for _ in range(WORKERS)], [None] * WORKERS

    def work(path):
        model = models[path.rank]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        method = gap(path)
        with attach(model, optimizer, method):
            train(model, optimizer, path.rank, range(EVERY))
            between[path.rank] = [kept.weights for kept in method.report().values()]
            train(model, optimizer, path.rank, range(EVERY, UNTIL))
        return [p.detach().clone() for p in model.parameters()]

    return models, between, together(WORKERS, work)


def test_all_end_alike_and_only_ones_own_part_was_dense():
    _, between, found = trained(sparse=False)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    sizes = [96, 192, 36]
    assert between == [[n if k == worker else n // 4 for k, n in enumerate(sizes)] for worker in range(WORKERS)]
    assert [int((w != 0).sum()) for w in found[0] if w.dim() > 1] == [n // 4 for n in sizes]


def test_sparse_layers_do_what_masked_ones_do():
    masked, sparse = trained(sparse=False)[0], trained(sparse=True)[0]
    assert [m.weights for m in sparse[0] if hasattr(m, "topology")] == [24, 48, 9]
    for a, b in zip(dense_weights(masked[0]), dense_weights(sparse[0]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_layer_comes_from_the_worker_that_grew_it(sparse):
    models = [network(sparse=sparse) for _ in range(WORKERS)]

    def work(path):
        model = models[path.rank]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with attach(model, optimizer, gap(path, rounds=1)):
            train(model, optimizer, path.rank, range(2))
            with torch.no_grad():
                for p in model.parameters():
                    p.fill_(1.0 + path.rank)  # weights that are not there are masked in the next step
            train(model, optimizer, path.rank, range(2, EVERY + 1))

    together(WORKERS, work)
    for model in models:
        for layer, weight in enumerate(dense_weights(model)):
            assert weight.unique().tolist() == [0.0, layer + 1.0]
        assert all(torch.equal(m.bias, torch.full_like(m.bias, 2.0)) for m in model if hasattr(m, "bias"))


def test_resumed_is_never_stopped():
    models = [network() for _ in range(WORKERS)]

    def work(path):
        model = models[path.rank]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with attach(model, optimizer, gap(path)) as session:
            train(model, optimizer, path.rank, range(EVERY + 2))
            state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), session.state_dict()))
            train(model, optimizer, path.rank, range(EVERY + 2, UNTIL))
        again = network()
        other = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
        with attach(again, other, gap(path)) as session:
            for thing, saved in zip((again, other, session), state, strict=True):
                thing.load_state_dict(saved)
            train(again, other, path.rank, range(EVERY + 2, UNTIL))
        return all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    assert all(together(WORKERS, work))


def test_refused():
    for options in ({"every": 0}, {"rounds": 0}, {"density": 0.0}):
        with pytest.raises(ValueError, match=r"density|at least 1"):
            together(1, lambda path, options=options: gap(path, **options))
    with pytest.raises(ValueError, match="worker from 0"):
        together(1, lambda path: ParallelGaP(Channel(path=path), worker=2, workers=2, density=0.5, every=1))

    def few(path):
        model = nn.Sequential(nn.Linear(3, 2))
        with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), gap(path)):
            pass

    with pytest.raises(ValueError, match="1 layers cannot be cut into 3"):
        together(WORKERS, few)

    def different(path):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with attach(model, optimizer, gap(path, density=0.25 + 0.25 * path.rank)):
            train(model, optimizer, path.rank, range(1))

    with pytest.raises(ExchangeError, match="density"):
        together(WORKERS, different)

    def exchanged(path):
        model, worker = network(), (1, 0, 2)[path.rank]
        method = ParallelGaP(Channel(path=path), worker=worker, workers=WORKERS, density=0.25, every=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with attach(model, optimizer, method):
            train(model, optimizer, path.rank, range(1))

    with pytest.raises(ExchangeError, match="ranks from 0 to 2"):
        together(WORKERS, exchanged)
