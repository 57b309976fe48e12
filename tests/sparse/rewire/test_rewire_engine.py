"""Connections move, their number stays, state follows, and nothing depends on having been stopped."""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from noctule.core.convert import convert_
from noctule.core.method import Method, attach
from noctule.core.optim import param_groups
from noctule.core.remap import Remap
from noctule.core.topology import Topology
from noctule.sparse.layers import FuseEpilogue, SparseLinear
from noctule.sparse.rewire import Rewire, anywhere, gse, guided, rigl, set_, sign_split, steepest

KINDS = {"set": set_, "gse": gse, "rigl": lambda **options: rigl(until=1000, **options)}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def model(density: float = 0.3, dtype: torch.dtype = torch.float32, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        SparseLinear(12, 20, density=density), nn.ReLU(), SparseLinear(20, 3, density=density, bias=False)
    ).to(dtype)


def data(steps: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(16, 12, generator=generator).to(dtype) for _ in range(steps)]


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(param_groups(network), lr=0.05, momentum=0.9)


def step(network: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    network(x).float().pow(2).mean().backward()
    optimizer.step()


def places(network: nn.Module) -> list[list[int]]:
    return [m.topology.keys().tolist() for m in network.modules() if isinstance(m, SparseLinear)]


class Peek(Method):
    """Looks at the layer before connections move (methods act in reverse after a step)."""

    def __init__(self, layer: SparseLinear) -> None:
        self.layer, self.remaps = layer, []

    def after_step(self) -> None:
        self.topology, self.values = self.layer.topology, self.layer.values.detach().clone()

    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        if layer is self.layer:
            self.remaps.append(remap)


# -- what moves ---------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_number_stays_survivors_keep_their_values_and_new_ones_are_zero(kind, dtype):
    network = model(dtype=dtype)
    layer, optimizer = network[0], sgd(network)
    peek, method = Peek(layer), kind(every=1, fraction=0.25)
    with attach(network, optimizer, method, peek):
        for x in data(4, dtype):
            step(network, optimizer, x)
            old, new = peek.topology, layer.topology
            assert new.size == old.size == 72
            dropped = set(old.keys().tolist()) - set(new.keys().tolist())
            grown = set(new.keys().tolist()) - set(old.keys().tolist())
            assert len(dropped) == len(grown) == peek.remaps[-1].grown
            remap = Remap.between(old, new)
            assert torch.equal(layer.values, remap.apply(peek.values))
            magnitude = peek.values.abs()
            gone = torch.isin(old.keys(), torch.tensor(sorted(dropped), dtype=torch.int64))
            if dropped:
                assert magnitude[gone].max() <= magnitude[~gone].min()
    assert method.moved["0"] == sum(remap.grown for remap in peek.remaps)
    if kind is not KINDS["rigl"]:
        assert method.moved == {"0": 4 * 18, "2": 4 * 4}


@kinds
def test_where_few_places_are_missing_the_smallest_of_all_go(kind):
    layer = SparseLinear(20, 20, density=0.97)
    peek = Peek(layer)
    with attach(layer, optimizer := sgd(layer), kind(every=1, fraction=0.3), peek):
        step(layer, optimizer, torch.randn(16, 20))
    gone = ~torch.isin(peek.topology.keys(), layer.topology.keys())
    assert int(gone.sum()) == 12
    assert peek.values[gone].abs().max() <= peek.values[~gone].abs().min()


class Twins(nn.Module):
    """Two layers of one topology and the same values, with the same input and the same gradient of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.one = SparseLinear(20, 20, density=0.1)
        self.other = SparseLinear(20, 20, topology=self.one.topology)
        self.other.load_state_dict(self.one.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.other(x)


@pytest.mark.parametrize("kind", [set_, gse])
def test_each_layer_each_move_and_each_seed_grow_other_places(kind):
    network, x, grown = Twins(), torch.randn(16, 20), []
    before, first = [p.detach().clone() for p in network.parameters()], network.one.topology
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    for seed in (0, 0, 1):
        with attach(network, optimizer, kind(every=1, seed=seed)):
            for _ in range(2):
                step(network, optimizer, x)
                for layer in (network.one, network.other):
                    grown.append(frozenset(layer.topology.keys().tolist()) - frozenset(first.keys().tolist()))
                    layer.remap_(first, Remap.between(layer.topology, first))
                with torch.no_grad():
                    for parameter, old in zip(network.parameters(), before):
                        parameter.copy_(old)
    assert {len(each) for each in grown} == {12}
    assert grown[:4] == grown[4:8]
    assert len(set(grown)) == 8  # of two seeds, two moves and two layers


def test_sign_split_drops_from_both_sides():
    network = model()
    layer, optimizer = network[0], sgd(network)
    peek = Peek(layer)
    with attach(network, optimizer, set_(every=1, drop=sign_split, fraction=0.5), peek):
        step(network, optimizer, data(1)[0])
    gone = ~torch.isin(peek.topology.keys(), layer.topology.keys())
    for side in (peek.values > 0, peek.values <= 0):
        assert int((gone & side).sum()) == int(0.5 * int(side.sum()))


def test_rigl_is_the_dense_algorithm():
    """Masks, weights and momenta of a dense layer, over several changes and with three micro-batches a step."""
    torch.manual_seed(0)
    sparse = SparseLinear(12, 10, weights=40, dtype=torch.float64)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    mask = torch.zeros(120, dtype=torch.bool)
    mask[sparse.topology.keys()] = True
    weight, bias = sparse.to_dense().weight.detach().clone(), sparse.bias.detach().clone()
    momentum = [torch.zeros(10, 12).double(), torch.zeros(10).double()]
    method = rigl(until=13, fraction=0.3, every=3)
    with attach(sparse, optimizer, method):
        for number in range(1, 16):
            parts = data(3 * number, torch.float64)[-3:]
            w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            optimizer.zero_grad()
            for x in parts:
                sparse(x).sin().sum().backward()
                F.linear(x, w, b).sin().sum().backward()
            optimizer.step()
            dense = w.grad.clone()
            momentum = [0.9 * momentum[0] + dense * mask.view(10, 12), 0.9 * momentum[1] + b.grad]
            weight, bias = weight - 0.05 * momentum[0], bias - 0.05 * momentum[1]
            if number % 3 == 0 and number < 13:
                count = int(method.fraction(number) * 40)
                score = weight.abs().flatten().masked_fill(~mask, torch.inf)
                steep = dense.abs().flatten().masked_fill(mask, -1.0)
                lost, won = score.topk(count, largest=False).indices, steep.topk(count).indices
                mask[lost], mask[won] = False, True
                weight.view(-1)[~mask], weight.view(-1)[won] = 0.0, 0.0
                momentum[0].view(-1)[~mask], momentum[0].view(-1)[won] = 0.0, 0.0
            assert sparse.topology.keys().tolist() == mask.nonzero()[:, 0].tolist()
            torch.testing.assert_close(sparse.to_dense().weight, weight)
            state = optimizer.state[sparse.values]["momentum_buffer"]
            torch.testing.assert_close(state, momentum[0].flatten()[mask])
    assert method.moved[""] == 18


@pytest.mark.parametrize("optimizer_of", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
def test_moments_follow_their_weights(optimizer_of):
    network = model()
    optimizer = optimizer_of(param_groups(network), lr=0.01)
    layer, before = network[0], {}

    class Copy(Peek):
        def after_step(self):
            super().after_step()
            before.update(
                {k: v.clone() for k, v in optimizer.state[layer.values].items() if v.shape == layer.values.shape}
            )

    with attach(network, optimizer, gse(every=2), Copy(layer)) as session:
        for x in data(2):
            step(network, optimizer, x)
    remap = Remap.between(session.methods[1].topology, layer.topology)
    assert remap.grown == int(0.3 * 72)
    state, kept = optimizer.state[layer.values], remap.old_slot >= 0
    assert torch.equal(state["exp_avg"], remap.apply(before["exp_avg"]))
    survivors = before["exp_avg_sq"][remap.old_slot[kept]]
    assert torch.equal(state["exp_avg_sq"], remap.apply(before["exp_avg_sq"], new=survivors.mean()))


# -- when ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("until", "due"), [(10, [3, 6, 9]), (9, [3, 6])])
def test_every_until_and_the_schedule(until, due):
    network = model()
    optimizer, asked = sgd(network), []

    def fraction(number: int) -> float:
        asked.append(number)
        return 0.1 * (number // 3)

    method, changes = Rewire(grow=anywhere, fraction=fraction, every=3, until=until, skip=["2"]), []
    with attach(network, optimizer, method):
        for number, x in enumerate(data(14), start=1):
            before, moved = places(network), dict(method.moved)
            step(network, optimizer, x)
            if places(network) != before:
                changes.append((number, method.moved["0"] - moved["0"]))
    assert asked == due
    assert changes == [(number, int(0.1 * (number // 3) * 72)) for number in due]
    assert set(method.moved) == {"0"}


@pytest.mark.parametrize("fraction", [0.0, 0.001])
@kinds
def test_a_fraction_of_nothing_moves_nothing(kind, fraction):
    network = model()
    optimizer, before = sgd(network), places(network)
    with attach(network, optimizer, kind(every=1, fraction=fraction)) as session:
        step(network, optimizer, data(1)[0])
    assert places(network) == before
    assert set(session.methods[0].moved.values()) == {0}


@pytest.mark.parametrize("fraction", [1.5, -0.1, float("nan")])
def test_a_schedule_that_leaves_its_range_is_an_error(fraction):
    network = model()
    optimizer = sgd(network)
    with (
        pytest.raises(ValueError, match=r"fraction .* at step 1"),
        attach(network, optimizer, set_(every=1, fraction=lambda step: fraction)),
    ):
        step(network, optimizer, data(1)[0])
    assert network[0].watch is None


@pytest.mark.parametrize("options", [{"every": 0}, {"fraction": 1.1}, {"fraction": -0.1}, {"fraction": float("nan")}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=r"every|fraction"):
        gse(**options)


def test_all_weights_may_move():
    network = model(density=0.5)
    optimizer, before = sgd(network), places(network)
    with attach(network, optimizer, set_(every=1, fraction=1.0)):
        step(network, optimizer, data(1)[0])
    for old, new in zip(before, places(network)):
        assert not set(old) & set(new)
        assert len(old) == len(new)


# -- the same again -----------------------------------------------------------------------------------------------


def train(kind, steps, *, stop_at: int | None = None, attach_first: bool = False, seed: int = 3):
    """Train; with ``stop_at``, in two processes' worth of objects with everything through a file in between."""
    network = model()
    optimizer = sgd(network)
    batches = data(steps)
    with attach(network, optimizer, kind(every=3, seed=seed)) as session:
        for x in batches[:stop_at]:
            step(network, optimizer, x)
        state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "session": session.state_dict()}
        moved = session.methods[0].moved
    if stop_at is None:
        return network, moved
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    network = model(seed=99)
    optimizer, method = sgd(network), kind(every=3, seed=seed)
    if not attach_first:
        network.load_state_dict(state["model"])
    with attach(network, optimizer, method) as session:
        session.load_state_dict(state["session"])
        if attach_first:  # the places change after the method began to look at the old ones
            network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for x in batches[stop_at:]:
            step(network, optimizer, x)
    return network, method.moved


def same(a: nn.Module, b: nn.Module) -> bool:
    return places(a) == places(b) and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@kinds
@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("attach_first", [False, True])
def test_resumed_is_never_stopped(kind, stop_at, attach_first):
    whole, moved = train(kind, 10)
    resumed, moved_in_both = train(kind, 10, stop_at=stop_at, attach_first=attach_first)
    assert same(whole, resumed)
    assert moved == moved_in_both
    assert moved["0"] > 0


@pytest.mark.parametrize("kind", [set_, gse])
@pytest.mark.parametrize("seed", [0, 123_456_789, 2**64, -1])
def test_the_seed_decides(kind, seed):
    first, _ = train(kind, 4, seed=seed)
    again, _ = train(kind, 4, seed=seed)
    other, _ = train(kind, 4, seed=seed + 1)
    assert same(first, again)
    assert not same(first, other)


# -- odd layers ---------------------------------------------------------------------------------------------------


@kinds
def test_full_layers_stay_and_nearly_full_ones_move_what_they_can(kind):
    for weights, moves in ((240, 0), (239, 1), (237, 3), (0, 0)):
        torch.manual_seed(0)
        layer = SparseLinear(12, 20, weights=weights)
        network = nn.Sequential(layer, nn.Linear(20, 1))
        optimizer = sgd(network)
        with attach(network, optimizer, kind(every=1, fraction=0.5)) as session:
            step(network, optimizer, data(1)[0])
        assert layer.weights == weights
        assert session.methods[0].moved == {"0": moves}


@kinds
def test_frozen_layers_stay_as_they_are(kind):
    network = model()
    network[0].values.requires_grad_(False)
    before, optimizer = network[0].to_dense().weight, sgd(network)
    with attach(network, optimizer, kind(every=1)) as session:
        for x in data(3):
            step(network, optimizer, x)
    assert torch.equal(network[0].to_dense().weight, before)
    assert session.methods[0].moved["0"] == 0
    assert session.methods[0].moved["2"] > 0


@pytest.mark.parametrize("kind", [gse, KINDS["rigl"]])
def test_a_layer_that_was_not_used_in_the_step_stays(kind):
    network = model()
    network.append(SparseLinear(5, 5, density=0.5))
    unused, optimizer = network[3], sgd(network)
    before = unused.topology
    with attach(network, optimizer, kind(every=1)) as session:
        for x in data(2):
            step(network[:3], optimizer, x)
    assert unused.topology is before
    assert session.methods[0].moved["3"] == 0
    assert session.methods[0].moved["0"] > 0


def test_a_layer_used_twice_is_seen_twice():
    torch.manual_seed(0)
    layer, x = SparseLinear(12, 12, weights=40), data(1)[0]
    network = nn.Sequential(layer, nn.Tanh(), layer)
    weight = layer.to_dense().weight.detach().requires_grad_()
    F.linear(torch.tanh(F.linear(x, weight, layer.bias)), weight, layer.bias).pow(2).mean().backward()
    gradient, optimizer = weight.grad.abs().flatten(), torch.optim.SGD(layer.parameters(), lr=0.0)
    old = layer.topology.keys()
    gradient[old] = -1.0
    with attach(network, optimizer, rigl(until=100, every=1, fraction=0.2)):
        step(network, optimizer, x)
    grown = set(layer.topology.keys().tolist()) - set(old.tolist())
    assert grown == set(gradient.topk(len(grown)).indices.tolist())


def test_a_fused_layer_grows_what_its_plain_twin_grows():
    plain, fused = model(), convert_(model(), FuseEpilogue()).model
    for network in (plain, fused):
        optimizer = sgd(network)
        with attach(network, optimizer, rigl(until=100, every=1)):
            for x in data(5):
                step(network, optimizer, x)
    assert places(plain) == places(fused)


@kinds
def test_somebody_else_may_change_the_places_in_between(kind):
    network = model()
    optimizer, layer = sgd(network), network[0]
    with attach(network, optimizer, kind(every=2)):
        for x in data(6):
            weights = 50 if layer.weights == 72 else 72
            new = Topology.random((20, 12), weights)
            layer.remap_(new, Remap.between(layer.topology, new), new=0.1)
            step(network, optimizer, x)
            assert layer.weights == weights
            assert (layer.topology.keys().diff() > 0).all()


# -- its place ----------------------------------------------------------------------------------------------------


@kinds
def test_the_end_leaves_nothing_behind(kind):
    network = model()
    optimizer, method = sgd(network), kind(every=1)
    for _ in range(2):  # and the same method may begin again
        with attach(network, optimizer, method):
            step(network, optimizer, data(1)[0])
        method.load_state_dict(method.state_dict())
        for layer in (network[0], network[2]):
            assert layer.watch is None
            assert not layer._remap_checks
            assert not layer._remap_hooks


@pytest.mark.parametrize(("first", "second"), [(gse, gse), (set_, set_), (gse, set_), (set_, gse)])
@pytest.mark.parametrize("every", [1, 100])
def test_two_on_one_layer_are_refused(first, second, every):
    network = model()
    optimizer = sgd(network)
    with pytest.raises(ValueError, match="one Rewire per layer"):
        attach(network, optimizer, first(every=every), second(every=every))
    with attach(network, optimizer, first(every=every, skip=["0"]), second(every=every, skip=["2"])):
        step(network, optimizer, data(1)[0])
    with attach(network, optimizer, first(every=every)):
        step(network, optimizer, data(1)[0])


def test_what_cannot_be_rewired_is_refused():
    dense = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no sparse layer"):
        attach(dense, torch.optim.SGD(dense.parameters(), lr=0.1), gse())
    network = model()
    with pytest.raises(ValueError, match=r"skip names no sparse layer: \['1'\]; there are \['0', '2'\]"):
        attach(network, sgd(network), gse(skip=["0", "1"]))
    with pytest.raises(ValueError, match="no sparse layer"):
        attach(network, sgd(network), gse(skip=["0", "2"]))


def test_only_the_steps_before_a_change_are_watched():
    network = model()
    optimizer, watched = sgd(network), []
    with attach(network, optimizer, Rewire(grow=guided, every=3)):
        for x in data(7):
            watched.append(network[0].watch is not None)
            step(network, optimizer, x)
    assert watched == [False, False, True, False, False, True, False]


def test_validation_between_the_steps_does_not_count():
    plain, busy = model(), model()
    for network in (plain, busy):
        optimizer = sgd(network)
        with attach(network, optimizer, Rewire(grow=steepest, every=2)):
            for x in data(4):
                if network is busy:
                    with torch.no_grad():
                        network.eval()(data(1)[0])
                    network.train()
                step(network, optimizer, x)
    assert same(plain, busy)


@pytest.mark.slow
def test_a_compiled_model_rewires_as_an_eager_one():
    torch.compiler.reset()
    eager, inside = model(), model()
    for network in (eager, inside):
        run = network if network is eager else torch.compile(network, backend="aot_eager")
        optimizer = sgd(network)
        with attach(network, optimizer, gse(every=2)) as session:
            for x in data(4):
                optimizer.zero_grad()
                run(x).pow(2).mean().backward()
                optimizer.step()
        assert session.methods[0].moved["0"] > 0
    assert same(eager, inside)
