"""Neurons that add curvature and change nothing go for good, and stopping changes nothing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW

from noctule.checkpoint import load, save
from noctule.compress.prune import SpectralPruning
from noctule.compress.prune.spectral import drop_of_radius
from noctule.compress.shrink import resize_to
from noctule.core.method import attach
from noctule.core.optim import param_groups


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))


def run(model: nn.Module, optimizer, first: int, last: int) -> None:
    model.train()
    for number in range(first, last):
        optimizer.zero_grad()
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(number))
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()


def pieces():
    model = network()
    return model, AdamW(param_groups(model), lr=0.01), SpectralPruning(every=5, fraction=0.25, window=3)


def test_the_drop_of_the_radius_bounds_the_true_one_and_is_exact_where_the_eigenvector_ends():
    a = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).double()
    moment = a.T @ a
    radius = torch.linalg.eigvalsh(moment)[-1]
    for j, drop in enumerate(drop_of_radius(moment, iterations=500)):
        rest = [i for i in range(8) if i != j]
        true = 1 - torch.linalg.eigvalsh(moment[rest][:, rest])[-1] / radius
        assert -1e-9 <= true <= drop + 1e-9  # Rayleigh's quotient is below the eigenvalue
    torch.testing.assert_close(drop_of_radius(torch.eye(3) * torch.tensor([1.0, 9.0, 2.0]))[1], torch.ones(()).double())


def test_neurons_go_on_time_and_their_layers_are_narrower():
    model, optimizer, method = pieces()
    with attach(model, optimizer, method):
        run(model, optimizer, 0, 4)
        assert (model[0].out_features, model[2].out_features) == (20, 16)
        run(model, optimizer, 4, 11)
    assert (model[0].out_features, model[2].out_features, model[4].in_features) == (12, 9, 9)
    assert method.removed == {"0": 8, "2": 7}
    assert not any(m._forward_hooks for m in model.modules())
    assert "4" in method.left


def test_neurons_that_give_nothing_go_first():
    model, optimizer, method = pieces()
    with torch.no_grad():
        model[0].bias[:5] = -100.0
        marked = model[0].weight[5:].clone()
    with attach(model, optimizer, method):
        run(model, optimizer, 0, 5)
    assert model[0].out_features == 15
    assert (model[0].weight - marked).abs().max() < 0.1


@pytest.mark.parametrize("stop", [3, 7])
def test_resumed_is_never_stopped_bit_for_bit(stop, tmp_path):
    model, optimizer, method = pieces()
    with attach(model, optimizer, method) as session:
        run(model, optimizer, 0, stop)
        save(tmp_path / "c", {"m": model.state_dict(), "o": optimizer.state_dict(), "s": session.state_dict()})
        run(model, optimizer, stop, 12)
    resumed, optimizer, method = pieces()
    state = load(tmp_path / "c")
    with attach(resumed, optimizer, method) as session:
        resize_to(resumed, state["m"])
        resumed.load_state_dict(state["m"])
        optimizer.load_state_dict(state["o"])
        session.load_state_dict(state["s"])
        run(resumed, optimizer, stop, 12)
    for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="1 <= window <= every"):
        SpectralPruning(every=5, window=6)
    with pytest.raises(ValueError, match="fraction must lie"):
        SpectralPruning(every=5, window=1, fraction=1.0)
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="no hidden linear layer"):
        attach(model, AdamW(model.parameters()), SpectralPruning(every=1, window=1))
