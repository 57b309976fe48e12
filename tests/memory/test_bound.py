"""Adaptive bounds: found, refreshed, applied to the right tensors, kept in a checkpoint; and COMET's law."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from noctule import SparseLinear, ToSparse, convert_
from noctule.core.method import attach
from noctule.memory import AdaptiveBound, compress_saved
from noctule.models import resnet


def step(model, optimizer, x, t, bound):
    optimizer.zero_grad()
    with compress_saved(adaptive=bound) as saved:
        loss = nn.functional.cross_entropy(model(x), t)
    loss.backward()
    optimizer.step()
    return saved, loss.detach()


def made(momentum=0.9):
    torch.manual_seed(0)
    model = resnet((1, 28, 28), 10, depth=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=momentum)
    return model, optimizer, torch.randn(16, 784), torch.randint(10, (16,))


def test_bounds_are_found_and_save():
    model, optimizer, x, t = made()
    bound = AdaptiveBound(k=0.05, every=3)
    kept = []
    with attach(model, optimizer, bound):
        for number in range(8):
            saved, _ = step(model, optimizer, x, t, bound)
            kept.append(saved.bytes_kept)
            assert bool(bound.bounds) == (number >= 1)
    assert kept[0] == pytest.approx(kept[1], rel=0.02)  # before there is a bound: 8 bits
    assert kept[2] < 0.9 * kept[0]
    assert {"stage1_0.conv1", "stage1_0.norm1", "stem.1"} <= bound.bounds.keys()
    assert all(value >= 0 for value in bound.bounds.values())


def test_a_sparse_layer_with_all_places_has_the_bound_of_its_dense_twin():
    bounds = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 10))
        if sparse:
            weight, bias = model[2].weight.detach().flatten(), model[2].bias.detach()
            convert_(model, ToSparse(density=1.0), where=lambda name, _: name == "2")
            assert isinstance(model[2], SparseLinear)
            model[2].load_state_dict({**model[2].state_dict(), "values": weight, "bias": bias})
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        bound = AdaptiveBound()
        x, t = torch.randn(64, 32), torch.randint(10, (64,))
        with attach(model, optimizer, bound):
            kept = [step(model, optimizer, x, t, bound)[0].bytes_kept for _ in range(3)]
        assert kept[2] < kept[0]
        bounds.append(bound.bounds)
    assert bounds[1] == pytest.approx(bounds[0], rel=0.01)


def test_a_larger_k_keeps_less():
    kept = []
    for k in (0.01, 0.1):
        model, optimizer, x, t = made()
        bound = AdaptiveBound(k=k)
        with attach(model, optimizer, bound):
            for _ in range(3):
                saved, _ = step(model, optimizer, x, t, bound)
        kept.append(saved.bytes_kept)
    assert kept[1] < kept[0]


def test_resumed_is_never_stopped():
    model, optimizer, x, t = made()
    bound = AdaptiveBound(every=3)
    with attach(model, optimizer, bound) as session:
        for _ in range(3):
            step(model, optimizer, x, t, bound)
        states = [thing.state_dict() for thing in (model, optimizer, session)]
        other, second = made()[:2]
        again = AdaptiveBound(every=3)
        with attach(other, second, again) as resumed:
            for thing, state in zip((other, second, resumed), states, strict=True):
                thing.load_state_dict(copy.deepcopy(state))
            for _ in range(5):
                one, two = step(model, optimizer, x, t, bound), step(other, second, x, t, again)
                assert torch.equal(one[1], two[1])
                assert one[0].bytes_kept == two[0].bytes_kept


def test_no_hook_stays():
    model, optimizer, x, t = made()
    bound = AdaptiveBound()
    with attach(model, optimizer, bound):
        for _ in range(3):
            step(model, optimizer, x, t, bound)
        assert not any(m._forward_hooks for m in model.modules())


def test_refused():
    for options in ({"k": 0.0}, {"k": float("nan")}, {"every": 0}):
        with pytest.raises(ValueError, match="must be"):
            AdaptiveBound(**options)
    with pytest.raises(ValueError, match="not attached"), compress_saved(adaptive=AdaptiveBound()):
        pass
    model, optimizer, *_ = made(momentum=0.0)
    with pytest.raises(ValueError, match="momentum"):
        attach(model, optimizer, AdaptiveBound())


class _OneStep:
    """The same step for whatever a ReLU made."""

    def __init__(self, size):
        self.size = size

    def forward(self):
        return nullcontext()

    def step_of(self, x):
        return self.size if x.grad_fn.name() == "ReluBackward0" else None


def _show(shown, place, layer, inputs, output):
    shown[place] = (inputs[0].detach(), output)


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.05, 0.15])
def test_the_law_of_the_gradients_error(fraction):
    """Jin et al.: a normal error of standard deviation eb sqrt(R / 3) ||g_c||, within 10 % over 50 batches, in hidden layers."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.Flatten(),
        nn.Linear(3872, 10),
    )
    squares = {2: [], 4: []}
    for _ in range(50):
        x, t = torch.randn(16, 1, 28, 28), torch.randint(10, (16,))
        shown: dict[int, tuple] = {}
        hooks = [model[i].register_forward_hook(partial(_show, shown, i)) for i in squares]
        loss = nn.functional.cross_entropy(model(x), t)
        outputs = [shown[i][1] for i in squares]
        got = torch.autograd.grad(loss, [*outputs, *[model[i].weight for i in squares]])
        for hook in hooks:
            hook.remove()
        bound = fraction * float(shown[2][0].square().mean().sqrt())
        with compress_saved(adaptive=_OneStep(2 * bound), recompute=False):
            loss = nn.functional.cross_entropy(model(x), t)
        found = torch.autograd.grad(loss, [model[i].weight for i in squares])
        for place, i in enumerate(squares):
            filled = float((shown[i][0] > 0).float().mean())
            norm_C = got[place].movedim(1, 0).flatten(1).norm(dim=1)
            law_C = bound * (filled / 3) ** 0.5 * norm_C
            error = (found[place] - got[2 + place]).flatten(1)
            squares[i].append(float((error / law_C[:, None]).square().mean()))
    for i, values in squares.items():
        ratio = (sum(values) / len(values)) ** 0.5
        assert 0.9 < ratio < 1.1, (i, ratio)
