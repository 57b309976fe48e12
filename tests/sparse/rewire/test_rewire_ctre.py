"""CTRE: the cosines against dense ones, what each mode does with the connections that go, and when *seq* becomes random."""

import io
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from noctule.checkpoint import tree
from noctule.core.convert import convert_
from noctule.core.method import attach
from noctule.core.optim import param_groups
from noctule.core.topology import Topology
from noctule.sparse.layers import FuseEpilogue, SparseConv2d, SparseLinear
from noctule.sparse.rewire import MostAlike, Rewire, ctre, set_

FORMS = {
    "exact": {"exact": True},
    "all sampled": {"exact": False, "candidates": 1000.0},
    "sampled": {"exact": False, "candidates": 1.0},
}
modes = pytest.mark.parametrize("mode", ["seq", "sim"])
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hidden(
    weights: int = 30, *, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (10, 12), seed: int = 0
) -> SparseLinear:
    """A layer with ReLU; some of its ten neurons are silent, one of its twelve inputs too (see `batch`)."""
    layer = SparseLinear(shape[1], shape[0], weights=weights, generator=seeded(seed), dtype=dtype)
    with torch.no_grad():
        layer.bias[:2] = -100.0
    return convert_(nn.Sequential(layer, nn.ReLU()), FuseEpilogue()).model[0]


def batch(size: int, *, inputs: int = 12, dtype: torch.dtype = torch.float32, seed: int = 5) -> torch.Tensor:
    x = torch.randn(size, inputs, generator=seeded(seed)).to(dtype)
    x[:, 3] = 0.0
    return x


def cosines(layer: SparseLinear, x: torch.Tensor, activation=torch.relu) -> torch.Tensor:
    """The slow, obvious oracle: |cosine| at every place, flat."""
    a, dense = x.double(), layer.to_dense()
    y = activation(F.linear(a, dense.weight.double(), dense.bias.double())).detach()
    found = torch.zeros(y.shape[1], a.shape[1]).double()
    for o in range(y.shape[1]):
        for i in range(a.shape[1]):
            lengths = y[:, o].norm() * a[:, i].norm()
            if lengths > 0:
                found[o, i] = (y[:, o] @ a[:, i]).abs() / lengths
    return found.flatten()


def looked(grow: MostAlike, layer: SparseLinear, *parts: torch.Tensor, seed: int = 1):
    """The capture after the backward passes of some micro-batches."""
    capture = grow(layer, seeded(seed))
    layer.watch = capture if callable(capture) else None
    for x in parts:
        layer(x).sum().backward()
    layer.watch = None
    return capture


def split(layer: SparseLinear, gone: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys that are taken, that go, and that stay."""
    taken = layer.topology.keys()
    slots = torch.randperm(layer.weights, generator=seeded(9))
    return taken, taken[slots[:gone]], taken[slots[gone:]]


def keys(x: torch.Tensor) -> set[int]:
    assert x.unique().numel() == x.numel()
    return set(x.tolist())


# -- the cosines --------------------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_the_most_alike_of_what_is_looked_at_are_chosen(form, dtype, count):
    layer, parts = hidden(dtype=dtype), batch(12, dtype=dtype).split([4, 7, 1])
    capture = looked(MostAlike(**form), layer, *parts)
    alike = cosines(layer, torch.cat(parts))
    taken, dropped, stays = split(layer, 9)
    chosen = capture.choose(count, taken, dropped)
    assert len(keys(chosen)) == count
    assert not keys(chosen) & keys(stays)
    others = set(range(120)) - keys(stays) - keys(chosen)
    if form["exact"] is False:
        seen = keys(capture.places.keys)
        assert keys(taken) <= seen
        assert len(seen) == (60 if form["candidates"] == 1.0 else 120)
        assert keys(chosen) <= seen
        others &= seen
    if count:
        slack = 0.02 if dtype == torch.bfloat16 else 1e-5
        assert alike[chosen].min() >= alike[sorted(others)].max() - slack
        assert alike[chosen].min() > 0.1


@modes
@pytest.mark.parametrize("tile", [1, 12, 13, 40, 1 << 22])
def test_tiles_do_not_matter(mode, tile, monkeypatch):
    whole = chosen_by(mode, exact=True)
    monkeypatch.setattr(sys.modules["noctule.sparse.rewire.rigl"], "TILE_PLACES", tile)
    assert chosen_by(mode, exact=True) == whole


def chosen_by(mode: str, **options) -> list[int]:
    layer = hidden(dtype=torch.float64)
    taken, dropped, _ = split(layer, 9)
    capture = looked(MostAlike(mode=mode, **options), layer, *batch(12, dtype=torch.float64).split([4, 8]))
    return sorted(capture.choose(9, taken, dropped).tolist())


@modes
@given(st.integers(1, 9), st.integers(2, 9), st.integers(0, 99), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_with_all_places_as_candidates_the_two_forms_are_the_same(mode, rows, columns, seed, draw):
    weights = draw.draw(st.integers(1, rows * columns))
    generator = seeded(seed)
    layer = SparseLinear(columns, rows, weights=weights, generator=generator, dtype=torch.float64)
    x, y_OB = torch.randn(6, columns, generator=generator).double(), torch.randn(rows, 6, generator=generator).double()
    taken, dropped, stays = split(layer, draw.draw(st.integers(0, weights)))
    count = min(dropped.numel(), rows * columns - weights)
    options = {"mode": mode, "candidates": 1000.0, "activation": lambda layer, y: y_OB}  # which has no ties
    chosen = [
        looked(MostAlike(exact=exact, **options), layer, x).choose(count, taken, dropped) for exact in (True, False)
    ]
    assert len(keys(chosen[0])) == len(keys(chosen[1])) == count
    alike = cosines(layer, x, activation=lambda y: y_OB.t())
    alike[stays] = -1.0
    best = keys(alike.topk(count).indices)
    if mode == "seq":
        assert keys(chosen[0]) == keys(chosen[1]) == best
    else:  # what is drawn at random may differ
        assert best - keys(dropped) <= keys(chosen[0]) & keys(chosen[1])
        assert not (keys(chosen[0]) | keys(chosen[1])) & keys(taken)


def test_layers_larger_than_the_threshold_are_sampled_and_nothing_dense_is_made(monkeypatch):
    layer = SparseLinear(100_000, 100_000, weights=1000, generator=seeded())
    capture = looked(MostAlike(), layer, torch.randn(3, 100_000, generator=seeded()))
    taken, dropped, _ = split(layer, 100)
    assert capture.places.keys.numel() == 257_000
    monkeypatch.setattr(sys.modules["noctule.sparse.rewire.ctre"], "CANDIDATES", 5000)
    assert MostAlike()(layer, seeded()).places.keys.numel() == 6000
    monkeypatch.setattr(sys.modules["noctule.sparse.rewire.ctre"], "CANDIDATES", 10)
    assert MostAlike()(layer, seeded()).places.keys.numel() == 2000
    assert len(keys(capture.choose(100, taken, dropped))) == 100
    small = hidden()
    assert not hasattr(MostAlike()(small, seeded()).places, "keys")
    assert hasattr(MostAlike(exact=False)(small, seeded()).places, "keys")
    monkeypatch.setattr(sys.modules["noctule.sparse.rewire.ctre"], "EXACT_PLACES", 119)
    assert hasattr(MostAlike()(small, seeded()).places, "keys")
    assert not hasattr(MostAlike(exact=True)(small, seeded()).places, "keys")


@modes
@forms
def test_silent_neurons_are_not_chosen_while_others_are_there(mode, form):
    layer, x = hidden(), batch(20)
    taken, dropped, _ = split(layer, 12)
    silent = cosines(layer, x) == 0
    assert {0, 12, 3} <= keys(silent.nonzero()[:, 0])
    options = form if form["exact"] else {**form, "candidates": 3.0}
    capture = looked(MostAlike(mode="seq", **options), layer, x)
    assert not silent[capture.choose(12, taken, dropped)].any()
    if mode == "sim":  # but what is drawn at random may be silent
        capture = looked(MostAlike(mode="sim", **options), layer, x)
        chosen, alike = capture.choose(12, taken, dropped), cosines(layer, x)
        alike[taken] = -1.0
        alike[dropped] = cosines(layer, x)[dropped]
        best = keys(alike.topk(12).indices)
        assert best - keys(dropped) <= keys(chosen)


@modes
@forms
def test_where_everything_is_silent_growth_is_random(mode, form):
    counts, layer = torch.zeros(120), hidden()
    taken, dropped, _ = split(layer, 9)
    for seed in range(300):
        chosen = looked(MostAlike(mode=mode, **form), layer, torch.zeros(4, 12), seed=seed).choose(9, taken, dropped)
        assert len(keys(chosen)) == 9
        counts[chosen] += 1
        layer.bias.data.fill_(-1.0)
    assert counts[taken].sum() == 0
    free = torch.ones(120, dtype=torch.bool)
    free[taken] = False
    assert (counts[free] - 30).abs().max() < 5 * (300 * 0.1 * 0.9) ** 0.5


@forms
def test_who_saw_nothing_grows_nothing(form):
    layer = hidden()
    taken, dropped, _ = split(layer, 9)
    assert MostAlike(**form)(layer, seeded()).choose(9, taken, dropped).numel() == 0


def test_activations_that_are_not_fused_are_given():
    plain, x = hidden(dtype=torch.float64), batch(12, dtype=torch.float64)
    fused_alike = cosines(plain, x)
    taken, dropped, stays = split(plain, 9)
    plain.epilogue = type(plain.epilogue)()
    seen = []

    def activation(layer: SparseLinear, y: torch.Tensor) -> torch.Tensor:
        seen.append((layer, tuple(y.shape)))
        return y.relu()

    chosen = looked(MostAlike(activation=activation), plain, x).choose(9, taken, dropped)
    assert seen == [(plain, (10, 12))]
    free = fused_alike.clone()
    free[stays] = -1.0
    assert keys(chosen) == keys(free.topk(9).indices)
    without = looked(MostAlike(), plain, x).choose(9, taken, dropped)
    raw = cosines(plain, x, activation=lambda y: y)
    raw[stays] = -1.0
    assert keys(without) == keys(raw.topk(9).indices) != keys(chosen)
    with pytest.raises(ValueError, match=r"keep the shape .* made \(1, 12\) of \(10, 12\)"):
        looked(MostAlike(activation=lambda layer, y: y[:1]), plain, x)


# -- training -----------------------------------------------------------------------------------------------------


def model(seed: int = 1, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (SparseLinear(12, 20, density=0.3), nn.ReLU(), SparseLinear(20, 3, density=0.4, bias=False))
    return convert_(nn.Sequential(*layers).to(dtype), FuseEpilogue()).model


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(param_groups(network), lr=0.05, momentum=0.9)


def data(steps: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = seeded(7)
    return [torch.randn(16, 12, generator=generator).to(dtype) for _ in range(steps)]


def step(network: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    network(x).pow(2).mean().backward()
    optimizer.step()


@modes
def test_it_is_the_authors_algorithm_on_a_dense_matrix(mode):
    """Masks, weights and momenta; in *sim* all but the random places, which the dense network is told."""
    layer = hidden(40, dtype=torch.float64, seed=3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    mask = torch.zeros(120, dtype=torch.bool)
    mask[layer.topology.keys()] = True
    weight, bias = layer.to_dense().weight.detach().clone(), layer.bias.detach().clone()
    momentum = [torch.zeros(10, 12).double(), torch.zeros(10).double()]
    again = drawn = 0
    with attach(layer, optimizer, ctre(mode=mode, every=2, fraction=0.3)) as session:
        for number in range(1, 13):
            x = batch(9, dtype=torch.float64, seed=number)
            alike = cosines(layer, x)
            w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            optimizer.zero_grad()
            layer(x).sin().mean().backward()
            F.linear(x, w, b).relu().sin().mean().backward()
            optimizer.step()
            momentum = [0.9 * momentum[0] + w.grad * mask.view(10, 12), 0.9 * momentum[1] + b.grad]
            weight, bias = weight - 0.05 * momentum[0], bias - 0.05 * momentum[1]
            if number % 2 == 0:
                lost = weight.abs().flatten().masked_fill(~mask, torch.inf).topk(12, largest=False).indices
                stays = mask.clone()
                stays[lost] = False
                best = keys(alike.masked_fill(stays, -1.0).topk(12).indices)
                assert alike[sorted(best)].min() > 0
                again += len(best & keys(lost))
                now = keys(layer.topology.keys())
                if mode == "sim":
                    best -= keys(lost)
                    drawn += 12 - len(best)
                    best |= now - keys(mask.nonzero()[:, 0])
                    assert len(best) == 12
                    assert not best & keys(lost)
                new = torch.tensor(sorted(best - keys(lost)), dtype=torch.int64)
                mask = stays
                mask[sorted(best)] = True
                weight.view(-1)[~mask], weight.view(-1)[new] = 0.0, 0.0
                momentum[0].view(-1)[~mask], momentum[0].view(-1)[new] = 0.0, 0.0
            assert layer.topology.keys().tolist() == mask.nonzero()[:, 0].tolist()
            torch.testing.assert_close(layer.to_dense().weight, weight)
            state = optimizer.state[layer.values]["momentum_buffer"]
            torch.testing.assert_close(state, momentum[0].flatten()[mask])
    assert again > 5  # or the test would not see what becomes of them
    assert drawn == (again if mode == "sim" else 0)
    assert session.methods[0].moved[""] == 6 * 12 - (0 if mode == "sim" else again)


@modes
@forms
def test_the_number_of_weights_stays_in_full_and_empty_layers_too(mode, form):
    for weights in (0, 1, 72, 237, 239, 240):
        torch.manual_seed(0)
        layer = SparseLinear(12, 20, weights=weights)
        network = nn.Sequential(layer, nn.Linear(20, 1))
        optimizer = sgd(network)
        with attach(network, optimizer, ctre(mode=mode, every=1, fraction=0.5, **form)) as session:
            for x in data(3):
                step(network, optimizer, x)
                assert layer.weights == weights
                assert len(keys(layer.topology.keys())) == weights
        moved, missing = session.methods[0].moved["0"], 240 - weights
        assert moved <= 3 * min(weights // 2, missing)
        if mode == "sim":
            assert moved == 3 * min(weights // 2, missing)


def test_what_is_chosen_again_stays_whatever_the_grower_returns():
    class Stubborn:
        """Wants the places that go, and one that is missing."""

        def choose(self, count, taken, dropped):
            missing = Topology.from_keys((20, 12), taken).missing(1, generator=seeded())
            return torch.cat([dropped[: count - 1], missing])

    network = model()
    layer, optimizer = network[0], sgd(network)
    before = layer.topology.keys()
    with attach(network, optimizer, Rewire(grow=lambda layer, generator: Stubborn(), every=1, skip=["2"])) as session:
        step(network, optimizer, data(1)[0])
    assert session.methods[0].moved == {"0": 1}
    assert len(keys(before) & keys(layer.topology.keys())) == layer.weights - 1


# -- when it becomes random ---------------------------------------------------------------------------------------


def test_seq_becomes_random_after_patience_and_stays_so():
    grow = MostAlike(patience=3)
    heard = [0.5, 0.6, 0.6, 0.1, 0.7, 0.7, 0.69, 0.7, 0.9, 1.0]
    told = []
    for score in heard:
        grow.observe(validation_accuracy=score, train_loss=-score)
        told.append(grow.random)
    assert told == [False] * 7 + [True] * 3


@pytest.mark.parametrize("patience", [1, 2, 40])
def test_the_switch_comes_at_the_very_observation(patience):
    grow = MostAlike(patience=patience)
    grow.observe(validation_accuracy=0.5)
    for number in range(1, patience + 1):
        assert not grow.random
        grow.observe(validation_accuracy=0.5 - number * 1e-3)
    assert grow.random


def test_losses_fall_where_accuracies_rise_and_the_accuracy_counts():
    grow = MostAlike(patience=2)
    for loss in (3.0, 2.0, 2.5, 1.0, 1.5):
        grow.observe(validation_loss=loss)
    assert (grow.random, grow.best, grow.waited) == (False, -1.0, 1)
    grow.observe(validation_accuracy=0.9)  # another measure than the one it began with
    assert (grow.best, grow.waited) == (-1.0, 1)
    both = MostAlike(patience=2)
    for accuracy in (0.1, 0.2, 0.3):
        both.observe(validation_loss=1 + accuracy, validation_accuracy=accuracy)
    assert (both.random, both.best) == (False, 0.3)
    broken = MostAlike(patience=2)
    for _ in range(2):
        broken.observe(validation_loss=math.nan)
    assert broken.random


def test_sim_never_becomes_random():
    grow = MostAlike(mode="sim", patience=1)
    for _ in range(5):
        grow.observe(validation_accuracy=0.1)
    assert not grow.random


def test_the_session_tells_and_random_growth_does_not_look():
    network = model()
    optimizer, watched = sgd(network), []
    with attach(network, optimizer, ctre(every=1, patience=2)) as session:
        for x in data(6):
            watched.append(network[0].watch is not None)
            step(network, optimizer, x)
            session.observe(validation_accuracy=0.5)
        moved = session.methods[0].moved
    assert watched == [True, True, True, True, False, False]  # the fourth capture began to look before the third score
    assert moved["0"] > 3 * int(0.2 * 72) - 1


def test_random_growth_is_uniform_even_if_the_sight_was_looking():
    layer, counts = hidden(), torch.zeros(120)
    taken, dropped, _ = split(layer, 9)
    for seed in range(300):
        grow = MostAlike(patience=1)
        capture = looked(grow, layer, batch(8), seed=seed)
        for _ in range(2):
            grow.observe(validation_accuracy=0.0)
        counts[capture.choose(9, taken, dropped)] += 1
    free = torch.ones(120, dtype=torch.bool)
    free[taken] = False
    assert counts[taken].sum() == 0
    assert (counts[free] - 30).abs().max() < 5 * (300 * 0.1 * 0.9) ** 0.5


# -- the same again -----------------------------------------------------------------------------------------------


SCORES = [0.1, 0.3, 0.2, 0.4, 0.3, 0.1, 0.4, 0.3, 0.9, 1.0, 1.0, 1.0]
"""*seq* becomes random at the seventh, while the capture of the eighth step is looking already."""


def train(options, *, stop_at: int | None = None, seed: int = 3):
    """Twelve steps with a score after each; with ``stop_at``, with everything through files in between."""
    network = model()
    optimizer = sgd(network)
    batches, method = data(len(SCORES)), ctre(every=2, seed=seed, patience=3, **options)
    with attach(network, optimizer, method) as session:
        for x, score in zip(batches[:stop_at], SCORES):
            step(network, optimizer, x)
            session.observe(validation_accuracy=score)
        state = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
        packed, tensors = tree.pack(session.state_dict())
    if stop_at is None:
        return network, method
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    network = model(seed=99)
    optimizer, method = sgd(network), ctre(every=2, seed=seed, patience=3, **options)
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    with attach(network, optimizer, method) as session:
        session.load_state_dict(tree.unpack(packed, tensors))
        for x, score in list(zip(batches, SCORES))[stop_at:]:
            step(network, optimizer, x)
            session.observe(validation_accuracy=score)
    return network, method


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(
        a.topology == b.topology and torch.equal(a.values, b.values)
        for a, b in zip(one.modules(), other.modules())
        if isinstance(a, SparseLinear)
    )


@modes
@forms
def test_resumed_is_never_stopped(mode, form):
    options = {"mode": mode, **form}
    whole, method = train(options)
    assert method.grow.random == (mode == "seq")
    for stop_at in (0, 3, 6, 7, 8, 11):
        resumed, again = train(options, stop_at=stop_at)
        assert same(whole, resumed), stop_at
        assert again.state_dict() == method.state_dict()


@modes
@forms
def test_it_is_deterministic_under_its_seed(mode, form):
    options = {"mode": mode, **form}
    first, second = train(options)[0], train(options)[0]
    assert same(first, second)
    assert not same(first, train(options, seed=4)[0])


def test_states_of_other_growth_do_no_harm():
    plain, alike = set_(), ctre()
    for number in range(3):
        alike.observe(validation_accuracy=-float(number))
    plain.load_state_dict(alike.state_dict())
    assert plain.state_dict() == {"steps": 0, "moved": {}}
    alike.load_state_dict(plain.state_dict())
    assert (alike.grow.best, alike.grow.waited) == (0.0, 2)


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "both"}, "mode must be 'seq' or 'sim', got 'both'"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"candidates": 0.0}, "candidates must be above 0"),
        ({"candidates": math.nan}, "candidates must be above 0"),
        ({"fraction": 1.1}, "fraction"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        ctre(**options)


def test_convolutions_are_refused_at_once_and_may_be_skipped():
    network = nn.Sequential(
        SparseConv2d(2, 3, 3, density=0.5), nn.ReLU(), nn.Flatten(), SparseLinear(12, 3, density=0.5)
    )
    optimizer, x = sgd(network), torch.randn(8, 2, 4, 4, generator=seeded())
    with pytest.raises(ValueError, match=r"not of SparseConv2d: give skip=\['0'\]"):
        attach(network, optimizer, ctre(every=100))
    assert network[0].watch is None
    with attach(network, optimizer, ctre(every=1, skip=["0"])) as session:
        step(network, optimizer, x)
    assert session.methods[0].moved["3"] >= 0
