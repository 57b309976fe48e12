"""Several workers that exchange their gradients are one worker on the union of their batches."""

import copy

import pytest
import torch
from torch import nn

from exchange_cases import Half, together
from noctule import ToSparse, convert_, set_
from noctule.codecs import Cast
from noctule.core.errors import ExchangeError
from noctule.core.exchange import Channel
from noctule.core.method import attach
from noctule.core.topology import Topology
from noctule.exchange import Compress, EverySync, Weigh
from noctule.sparse.layers import SparseLinear


def network(seed: int = 0, *, sparse: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return convert_(model, ToSparse(density=0.4)).model if sparse else model


def batches(steps: int, rows: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(rows, 6, generator=generator), torch.randn(rows, 3, generator=generator)) for _ in range(steps)
    ]


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x) - y).pow(2).mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model, optimizer, data, part=slice(None), each=lambda: None):
    for x, y in data:
        optimizer.zero_grad()
        loss_of(model, x[part], y[part]).backward()
        each()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def close(found, right, tolerance=1e-6):
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("sparse", [False, True])
def test_all_workers_are_one_on_the_union(world, sparse):
    models = [network(sparse=sparse) for _ in range(world)]

    def work(path):
        model, rows = models[path.rank], 12 // world
        optimizer = sgd(model)
        with attach(model, optimizer, EverySync(Channel(path=path))) as session:
            found = train(model, optimizer, batches(6), slice(path.rank * rows, (path.rank + 1) * rows))
        assert session.steps == 6
        return found

    one = network(sparse=sparse)
    expected = train(one, sgd(one), batches(6))
    everyone = together(world, work)
    for found in everyone:
        close(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(found, everyone[0], strict=True))


def test_unequal_batches_with_weights():
    parts = [slice(0, 1), slice(1, 8), slice(8, 8), slice(8, 12)]
    models = [network() for _ in parts]

    def work(path):
        model, part = models[path.rank], parts[path.rank]
        optimizer, weigh = sgd(model), Weigh(part.stop - part.start)
        sync = EverySync(Channel(weigh, path=path))
        with attach(model, optimizer, sync):
            if part.stop > part.start:
                return train(model, optimizer, batches(4), part)
            for _ in range(4):  # it has no samples, and takes part all the same
                optimizer.zero_grad()
                sync.now()
                optimizer.step()
            return [p.detach().clone() for p in model.parameters()]

    one = network()
    expected = train(one, sgd(one), batches(4))
    for found in together(4, work):
        close(found, expected)


def test_micro_batches_exchange_their_sum():
    models = [network() for _ in range(2)]

    def work(path):
        model, half = models[path.rank], slice(6 * path.rank, 6 * path.rank + 6)
        optimizer, channel = sgd(model), Channel(path=path)
        sync = EverySync(channel)
        with attach(model, optimizer, sync):
            for x, y in batches(3):
                optimizer.zero_grad()
                with sync.paused():
                    (loss_of(model, x[half][:3], y[half][:3]) / 2).backward()
                (loss_of(model, x[half][3:], y[half][3:]) / 2).backward()
                optimizer.step()
        assert channel.calls == 3
        return [p.detach().clone() for p in model.parameters()]

    one = network()
    expected = train(one, sgd(one), batches(3))
    for found in together(2, work):
        close(found, expected)


def test_clipping_sees_the_gradient_of_all():
    models = [network() for _ in range(2)]

    def work(path):
        model, norms = models[path.rank], []
        optimizer = sgd(model)
        with attach(model, optimizer, EverySync(Channel(path=path))):
            part = slice(6 * path.rank, 6 * path.rank + 6)
            train(
                model, optimizer, batches(3), part,
                lambda: norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05).item()),
            )  # fmt: skip
        return norms

    first, second = together(2, work)
    assert first == second
    one, norms = network(), []
    train(
        one, sgd(one), batches(3),
        each=lambda: norms.append(nn.utils.clip_grad_norm_(one.parameters(), 0.05).item()),
    )  # fmt: skip
    assert first == pytest.approx(norms, rel=1e-5)


def test_an_overflow_on_one_worker_skips_the_step_of_all():
    models = [network() for _ in range(2)]

    def work(path):
        model = models[path.rank]
        optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=4.0)
        scales, before = [], []
        with attach(model, optimizer, EverySync(Channel(Compress(Cast(torch.bfloat16)), path=path))) as session:
            for step, (x, y) in enumerate(batches(4)):
                optimizer.zero_grad()
                loss = loss_of(model, x, y)
                if step == 1 and path.rank == 1:
                    loss = loss * torch.inf
                scaler.scale(loss).backward()
                before.append([p.detach().clone() for p in model.parameters()])
                scaler.step(optimizer)
                scaler.update()
                scales.append(scaler.get_scale())
        assert all(torch.equal(a, b) for a, b in zip(before[1], before[2], strict=True))  # nothing moved in step 1
        assert session.steps == 3
        return scales, [p.detach().clone() for p in model.parameters()]

    (first, weights), (second, others) = together(2, work)
    assert first == second == [4.0, 2.0, 2.0, 2.0]
    assert all(torch.equal(a, b) and bool(torch.isfinite(a).all()) for a, b in zip(weights, others, strict=True))


def test_parameters_that_only_some_workers_use():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.both, self.one, self.none = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    models = [Two() for _ in range(2)]

    def work(path):
        model = models[path.rank]
        optimizer = sgd(model)
        with attach(model, optimizer, EverySync(Channel(path=path))):
            x = model.both(torch.ones(1, 2))
            (model.one(x) if path.rank else x).sum().backward()
            return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}

    first, second = together(2, work)
    assert first["none.weight"] is None
    assert second["none.weight"] is None
    assert torch.equal(first["one.bias"], torch.full((2,), 0.5))
    for name, grad in first.items():
        assert grad is None or torch.equal(grad, second[name])


@pytest.mark.parametrize("world", [1, 3])
def test_a_gradient_of_zero_on_one_worker_is_one_on_all_and_weights_decay(world):
    """To an optimizer a gradient of zero is another thing than none."""
    models = [nn.ModuleList(nn.Linear(2, 2) for _ in range(3)) for _ in range(world)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())

    def work(path):
        model = models[path.rank]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
        with attach(model, optimizer, EverySync(Channel(path=path))):
            x = model[0](torch.ones(1, 2))
            (x + 0.0 * model[1](x) if path.rank == world - 1 else x).sum().backward()
            optimizer.step()
        return model.state_dict()

    before = copy.deepcopy(models[0].state_dict())
    for after in together(world, work):
        assert not torch.equal(after["0.weight"], before["0.weight"])
        torch.testing.assert_close(after["1.weight"], 0.95 * before["1.weight"])
        assert torch.equal(after["2.weight"], before["2.weight"])


@pytest.mark.parametrize("codec", [None, Half()], ids=["exact", "half"])
def test_moving_connections_stay_alike_and_what_is_owed_follows(codec):
    models = [network(sparse=True) for _ in range(3)]
    places = models[0][0].topology

    def work(path):
        model = models[path.rank]
        optimizer = sgd(model)
        compress = [] if codec is None else [Compress(codec)]
        channel = Channel(*compress, path=path)
        with attach(model, optimizer, EverySync(channel), set_(every=2, seed=1)):
            weights = train(model, optimizer, batches(7), slice(4 * path.rank, 4 * path.rank + 4))
        if compress:
            assert compress[0].owed["0.values"].shape == model[0].values.shape
            assert "0.values" in compress[0].forgone
        return weights, model[0].topology

    everyone = together(3, work)
    for weights, topology in everyone:
        assert topology == everyone[0][1]
        assert topology != places
        assert all(torch.equal(a, b) for a, b in zip(weights, everyone[0][0], strict=True))


def test_resuming_is_never_having_stopped():
    models = [network(sparse=True) for _ in range(2)]

    def work(path):
        part = slice(6 * path.rank, 6 * path.rank + 6)

        def session(model):
            optimizer = sgd(model)
            methods = EverySync(Channel(Compress(Half()), path=path)), set_(every=2, seed=1)
            return optimizer, attach(model, optimizer, *methods)

        whole = copy.deepcopy(models[path.rank])
        optimizer, opened = session(whole)
        with opened:
            expected = train(whole, optimizer, batches(6), part)
        first = models[path.rank]
        optimizer, opened = session(first)
        with opened:
            train(first, optimizer, batches(6)[:3], part)
            states = copy.deepcopy([first.state_dict(), optimizer.state_dict(), opened.state_dict()])
        second = network(sparse=True)
        second.load_state_dict(states[0])
        optimizer, opened = session(second)
        optimizer.load_state_dict(states[1])
        with opened:
            opened.load_state_dict(states[2])
            found = train(second, optimizer, batches(6)[3:], part)
        return expected, found

    for expected, found in together(2, work):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_after_the_session_nothing_is_sent():
    models = [network() for _ in range(2)]

    def work(path):
        model, channel = models[path.rank], Channel(path=path)
        optimizer = sgd(model)
        with attach(model, optimizer, EverySync(channel)):
            pass
        loss_of(model, *batches(1)[0]).backward()
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        return channel.calls

    assert together(2, work) == [0, 0]


class Breaking(torch.autograd.Function):
    """Backward raises."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("in the middle of backward")


def test_after_a_pass_that_broke_off_the_next_one_is_exchanged():
    models = [network() for _ in range(2)]

    def work(path):
        model, channel = models[path.rank], Channel(path=path)
        optimizer = sgd(model)
        with attach(model, optimizer, EverySync(channel)):
            with pytest.raises(ValueError, match="in the middle of backward"):
                model(Breaking.apply(torch.ones(1, 6, requires_grad=True))).sum().backward()
            train(model, optimizer, batches(2), slice(6 * path.rank, 6 * path.rank + 6))
        return channel.calls, [p.detach().clone() for p in model.parameters()]

    one = network()
    expected = train(one, sgd(one), batches(2))
    for calls, found in together(2, work):
        assert calls == 2
        close(found, expected)


def test_connections_that_move_apart_are_told():
    models = [network(sparse=True) for _ in range(2)]

    def work(path):
        model = models[path.rank]
        optimizer = sgd(model)
        moving = set_(every=2, seed=path.rank)  # each worker draws others
        with (
            attach(model, optimizer, EverySync(Channel(path=path)), moving),
            pytest.raises(ExchangeError, match=r"workers 0 and 1 differ in '0\.topology'"),
        ):
            train(model, optimizer, batches(4))

    together(2, work)


def other_weights(rank):
    return network(rank)


def other_places(rank):
    layer = SparseLinear(6, 3, density=0.5, generator=torch.Generator().manual_seed(0))
    if rank:
        keys = layer.topology.keys().clone()
        layer.topology = Topology.from_keys(layer.topology.shape, torch.sort((keys + 1) % 18).values)
    return layer


def other_shape(rank):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 3 + rank))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (other_weights, r"workers 0 and 1 differ in '0.weight': float32 \(16, 6\)"),
        (other_places, "differ in '.topology'"),
        (other_shape, r"differ in '0.weight': float32 \(3, 6\) \w+ and float32 \(4, 6\)"),
    ],
)
def test_models_that_differ_are_told_on_every_worker(make, text):
    models = [make(rank) for rank in range(2)]

    def work(path):
        sync = EverySync(Channel(path=path))
        with (
            attach(models[path.rank], sgd(models[path.rank]), sync),
            pytest.raises(ExchangeError, match=text),
        ):
            sync.now()

    together(2, work)


def test_channels_that_differ_are_told():
    def work(path):
        model = nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(1.0)
        stages = [Compress(Half())] if path.rank else []
        with (
            attach(model, sgd(model), EverySync(Channel(*stages, path=path))),
            pytest.raises(
                ExchangeError, match=r"differ in 'exchange': Channel\(path=Local.* and Channel\(Compress\(Half"
            ),
        ):
            model(torch.ones(1, 1)).sum().backward()

    together(2, work)
