"""Connections go on schedule and stay gone, the pattern holds after every step, and stopping changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW

from noctule.checkpoint import load, save
from noctule.compress.prune import (
    NM,
    Blocks,
    Candidates,
    Globally,
    PerLayer,
    Prune,
    Rows,
    gradual_magnitude,
    magnitude,
    sparsify_,
    taylor,
)
from noctule.compress.shrink import shrink
from noctule.core.convert import convert_
from noctule.core.method import Method, attach
from noctule.core.optim import param_groups
from noctule.core.schedule import linear
from noctule.sparse.budget import erdos_renyi
from noctule.sparse.layers import SparseConv2d, SparseLayer, SparseLinear, ToSparse

OPTIMIZERS = {
    "sgd": lambda groups: SGD(groups, lr=0.05),
    "nesterov": lambda groups: SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda groups: Adam(groups, lr=0.01),
    "adamw fused": lambda groups: AdamW(groups, lr=0.01, fused=True),
}
PATTERNS = {
    "per layer": PerLayer(),
    "erdos-renyi": PerLayer(budget=erdos_renyi),
    "globally": Globally(),
    "rows": Rows(),
    "2:4": NM(),
    "1:5": NM(1, 5),
    "blocks": Blocks(4, 1),
    "2 x 3 blocks": Blocks(2, 3),
}


def network(*, kind: str = "dense", seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(96, 10), nn.ReLU(), nn.Linear(10, 3)),
    )
    if kind == "sparse":
        convert_(model, ToSparse(density=1.0, fresh=False))
    elif kind == "mixed":
        convert_(model, ToSparse(density=1.0, fresh=False), where=lambda name, module: name == "4")
    return model


def run(model: nn.Module, optimizer, first: int, last: int) -> None:
    model.train()
    for number in range(first, last):
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(number))
        (model(x) - x[:, :3]).pow(2).mean().backward()
        optimizer.step()


def dense_weights(model: nn.Module) -> list[torch.Tensor]:
    return [
        (m.to_dense() if isinstance(m, SparseLayer) else m).weight.detach().flatten(1)
        for m in model.modules()
        if isinstance(m, SparseLayer | nn.Linear | nn.Conv2d)
    ]


def share(prune) -> float:
    kept = prune.report().values()
    return sum(k.weights for k in kept) / sum(k.places for k in kept)


def holds(pattern, weights: list[torch.Tensor], density: float) -> None:
    """The slow, obvious oracle."""
    places = sum(w.numel() for w in weights)
    if isinstance(pattern, Globally | PerLayer):
        assert sum(int(w.count_nonzero()) for w in weights) <= max(round(density * places), len(weights))
    for w in weights:
        if isinstance(pattern, Rows):
            assert int((w != 0).any(1).sum()) <= max(1, round(density * w.shape[0]))
        if isinstance(pattern, NM):
            for row in w:
                assert all(
                    int(group.count_nonzero()) <= max(pattern.n, round(density * pattern.m))
                    for group in row.split(pattern.m)
                )
        if isinstance(pattern, Blocks):
            blocks = [bool(part.any()) for band in w.split(pattern.height, 0) for part in band.split(pattern.width, 1)]
            assert sum(blocks) <= max(1, round(density * len(blocks)))


class Watch(Method):
    """Checks after every step; attached first, it comes last."""

    def __init__(self, check) -> None:
        self.check = check

    def after_step(self) -> None:
        self.check()


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("kind", ["dense", "mixed"])
def test_the_pattern_holds_after_every_step_and_nothing_comes_back(kind, pattern):
    model = network(kind=kind)
    optimizer = SGD(param_groups(model), lr=0.05, momentum=0.9, nesterov=True)
    prune = Prune(schedule=linear(1.0, end=0.2, steps=8), pattern=pattern, every=2)
    before = [w != 0 for w in dense_weights(model)]

    def check() -> None:
        now = [w != 0 for w in dense_weights(model)]
        assert not any(bool((new & ~old).any()) for new, old in zip(now, before, strict=True))
        before[:] = now
        holds(pattern, dense_weights(model), prune.density)

    with attach(model, optimizer, Watch(check), prune):
        run(model, optimizer, 0, 14)
    assert prune.density == pytest.approx(0.2)
    kept = prune.report()
    assert {name: k.sparse for name, k in kept.items()} == {"1": False, "4": kind == "mixed", "6": False}
    assert [k.weights for k in kept.values()] == [int(w.count_nonzero()) for w in dense_weights(model)]


layers = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))


@settings(max_examples=60, deadline=None)
@given(st.lists(layers, min_size=1, max_size=3), st.floats(0.01, 1.0), st.sampled_from([*PATTERNS.values()]))
def test_patterns_of_any_layers_keep_what_they_say_and_the_best_one(shapes, density, pattern):
    weights = []
    for height, width, seed in shapes:
        w = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) + 0.1
        weights.append(w * (torch.rand(w.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.8))
    candidates = [
        Candidates(tuple(w.shape), w.flatten().nonzero()[:, 0], w.flatten()[w.flatten() != 0]) for w in weights
    ]
    left = [torch.zeros_like(w) for w in weights]
    for w, c, stays in zip(left, candidates, pattern(candidates, density), strict=True):
        w.view(-1)[c.keys[stays]] = c.scores[stays]
    holds(pattern, left, density)
    again = [
        Candidates(c.shape, c.keys[s], c.scores[s])
        for c, s in zip(candidates, pattern(candidates, density), strict=True)
    ]
    assert all(bool(s.all()) for s in pattern(again, density))  # once pruned, nothing more goes
    if isinstance(pattern, Globally | NM):
        for w, c in zip(left, candidates, strict=True):
            assert not c.scores.numel() or w.max() == c.scores.max()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_masked_layer_trains_as_a_sparse_one_that_loses_places(make):
    results = []
    for kind in ("dense", "sparse", "mixed"):
        model = network(kind=kind)
        optimizer = make(param_groups(model))
        with attach(model, optimizer, Prune(schedule=linear(1.0, end=0.1, steps=10), every=3)):
            run(model, optimizer, 0, 16)
        results.append(dense_weights(model))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a != 0, b != 0)
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("kind", ["dense", "mixed"])
@pytest.mark.parametrize("score", [magnitude, taylor])
def test_resumed_is_never_stopped_bit_for_bit(kind, make, score, tmp_path):
    def pieces():
        model = network(kind=kind)
        optimizer = make(param_groups(model))
        return (
            model,
            optimizer,
            Prune(schedule=linear(1.0, end=0.1, steps=10), every=2, score=score, pattern=Globally()),
        )

    model, optimizer, prune = pieces()
    with attach(model, optimizer, prune) as session:
        run(model, optimizer, 0, 7)
        save(tmp_path / "c", {"m": model.state_dict(), "o": optimizer.state_dict(), "s": session.state_dict()})
        run(model, optimizer, 7, 14)
    resumed, optimizer, prune = pieces()
    state = load(tmp_path / "c")
    with attach(resumed, optimizer, prune) as session:
        resumed.load_state_dict(state["m"])
        optimizer.load_state_dict(state["o"])
        session.load_state_dict(state["s"])
        run(resumed, optimizer, 7, 14)
    for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_at_density_one_it_is_the_baseline():
    models = [network(), network()]
    for model, methods in zip(models, ([], [Prune(schedule=1.0, every=1)]), strict=True):
        optimizer = Adam(model.parameters())
        with attach(model, optimizer, *methods):
            run(model, optimizer, 0, 5)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_a_rising_schedule_brings_nothing_back():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    prune = Prune(schedule=linear(0.2, end=1.0, steps=5), every=1)
    with attach(model, optimizer, prune):
        run(model, optimizer, 0, 6)
    assert share(prune) < 0.45


def test_taylor_takes_what_costs_least():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[5.0, 1.0]])
    model = nn.Sequential(layer)
    optimizer = SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, Prune(schedule=0.5, every=1, score=taylor)):
        model(torch.tensor([[0.001, 1.0]])).sum().backward()
        optimizer.step()
    assert layer.weight.tolist() == [[0.0, 1.0]]


def test_gradual_magnitude_follows_the_cubic_ramp():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    prune = gradual_magnitude(density=0.1, start=2, until=12, every=2)
    seen = []
    with attach(model, optimizer, Watch(lambda: seen.append(share(prune))), prune):
        run(model, optimizer, 0, 14)
    expected = [0.1 + 0.9 * (1 - min(max(step - 2, 0), 10) / 10) ** 3 for step in range(2, 15, 2)]
    assert seen[1::2] == pytest.approx(expected, abs=2e-3)


# -- truly sparse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_sparsify_goes_on_as_the_masked_layer_would(make):
    ends = []
    for stop in (False, True):
        model = network()
        optimizer = make(param_groups(model))
        prune = Prune(schedule=linear(1.0, end=0.1, steps=10), every=2)
        with attach(model, optimizer, prune):
            run(model, optimizer, 0, 10)
            if not stop:
                run(model, optimizer, 10, 14)
        if stop:
            y = model(torch.ones(2, 16))
            conversion = sparsify_(model, below=0.5, optimizers=optimizer)
            assert {*conversion.changed} == {"1", "4", "6"}
            torch.testing.assert_close(model(torch.ones(2, 16)), y)
            with attach(model, optimizer, prune):
                run(model, optimizer, 10, 14)
            assert all(kept.sparse for kept in prune.report().values())
            assert isinstance(model[1], SparseConv2d)
            assert isinstance(model[4], SparseLinear)
        ends.append(dense_weights(model))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_sparsify_leaves_what_does_not_pay_and_what_is_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[1].weight[1:] = 0.0
    with pytest.warns(UserWarning, match="changed nothing"):
        conversion = sparsify_(model, optimizers=SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert "75.0% of its weights" in conversion.left["0"]
    assert "tied" in conversion.left["1"]
    with attach(model, SGD(model.parameters(), lr=0.1)), pytest.raises(ValueError, match="close the session"):
        sparsify_(model)


def test_masks_follow_a_width():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    prune = Prune(schedule=0.5, every=1)
    with attach(model, optimizer, prune):
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).pow(2).sum().backward()
            optimizer.step()
            if not step:
                zero = model[0].weight == 0
                keep = torch.tensor([0, 2, 3, 5])
                shrink(model, {"0": keep})
                assert torch.equal(model[0].weight == 0, zero[keep])
    assert torch.equal(model[0].weight == 0, zero[keep])


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": 0.0}, r"density must lie in \(0, 1\]"),
        ({"schedule": 1.5}, r"density must lie in \(0, 1\]"),
        ({"schedule": 0.5, "every": 0}, "every must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Prune(**options)


def test_bad_models_and_states_are_refused():
    for model, options, words in (
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), {}, "no linear layer"),
        (network(), {"skip": ["9"]}, r"skip names no layer: \['9'\]"),
    ):
        parameters = list(model.parameters())
        with pytest.raises(ValueError, match=words):
            attach(model, SGD(parameters, lr=0.1), Prune(schedule=0.5, **options))
    model, other = network(), nn.Sequential(nn.Linear(3, 2))
    state = Prune(schedule=0.5)
    with attach(other, SGD(other.parameters(), lr=0.1), state):
        saved = state.state_dict()
    prune = Prune(schedule=0.5)
    with (
        attach(model, SGD(model.parameters(), lr=0.1), prune),
        pytest.raises(ValueError, match="the model that it was saved"),
    ):
        prune.load_state_dict(saved)
    with pytest.raises(ValueError, match="below must lie"):
        sparsify_(model, below=0.0)
    with pytest.raises(ValueError, match="1 <= n <= m"):
        NM(5, 4)
    with pytest.raises(ValueError, match="taylor needs the gradient"):
        taylor(torch.ones(2), None)
    with pytest.raises(ValueError, match="0 <= start < until"):
        gradual_magnitude(density=0.1, start=5, until=5)


def test_diverged_weights_and_bad_schedules_are_said():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.0)
    wrong = Prune(schedule=lambda step: -1.0, every=1)
    with attach(model, optimizer, wrong), pytest.raises(ValueError, match="the schedule at step 1"):
        run(model, optimizer, 0, 1)
    with attach(model, optimizer, Prune(schedule=0.5, every=1)):
        with torch.no_grad():
            model[6].weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="are not finite"):
            run(model, optimizer, 0, 1)


def test_frozen_tied_and_skipped_layers_are_left_and_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    model[2].weight = model[1].weight
    prune = Prune(schedule=0.5, every=1, skip=["3"])
    with attach(model, SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), prune):
        assert {name: why.split()[-1] for name, why in prune.left.items()} == {"0": "frozen", "2": "too", "3": "it"}
        assert [*prune.report()] == ["1"]
