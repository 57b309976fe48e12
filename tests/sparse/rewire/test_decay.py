import pytest
import torch
from torch import nn

from noctule.core.method import attach
from noctule.sparse.layers import SparseLinear
from noctule.sparse.rewire import set_
from noctule.sparse.rewire.decay import Decay


def model() -> nn.Sequential:
    return nn.Sequential(SparseLinear(8, 6, density=0.5), nn.LayerNorm(6), nn.Linear(6, 2))


def test_weights_shrink_geometrically_and_nothing_else_does():
    network = model()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    with attach(network, optimizer, Decay(0.1)):
        for _ in range(5):
            optimizer.zero_grad()
            network(torch.randn(3, 8)).sum().backward()
            optimizer.step()
    for name, p in network.named_parameters():
        decays = name in ("0.values", "2.weight")
        torch.testing.assert_close(p.detach(), before[name] * (0.9**5 if decays else 1.0))


def test_it_is_decoupled_from_gradient_rate_and_momentum():
    layer = SparseLinear(8, 6, density=0.5, bias=False)
    value, momentum = layer.values.detach().clone(), torch.zeros(24)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3, momentum=0.9)
    with attach(layer, optimizer, Decay(0.02)):
        for number in range(1, 6):
            gradient = torch.full((24,), 1.0 / number)
            layer.values.grad = gradient.clone()
            optimizer.step()
            momentum = 0.9 * momentum + gradient
            value = 0.98 * value - 0.3 * momentum
    torch.testing.assert_close(layer.values.detach(), value)


def test_frozen_weights_stay_and_new_ones_of_another_number_decay():
    network = model()
    network[2].requires_grad_(False)
    before = network[2].weight.clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    with attach(network, optimizer, Decay(0.5), set_(every=1)):
        for weights in (24, 9):
            smaller = SparseLinear(8, 6, weights=weights)
            network[0].load_state_dict(smaller.state_dict())
            network(torch.randn(3, 8)).sum().backward()
            total = network[0].values.detach().sum()
            optimizer.step()
            assert network[0].values.detach().abs().sum() <= 0.5 * smaller.values.abs().sum() + 1e-6
            assert total != 0
    assert torch.equal(network[2].weight, before)


def test_a_model_with_nothing_to_decay_is_left_as_it_is():
    norm = nn.LayerNorm(3)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.0)
    with attach(norm, optimizer, Decay(0.5)):
        norm(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    assert torch.equal(norm.weight, torch.ones(3))


def test_a_rate_of_zero_changes_nothing():
    layer = SparseLinear(8, 6, density=0.5)
    before = layer.values.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    with attach(layer, optimizer, Decay(0.0)):
        layer(torch.randn(3, 8)).sum().backward()
        optimizer.step()
    assert torch.equal(layer.values, before)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_rates_outside_their_range_are_refused(rate):
    with pytest.raises(ValueError, match="rate must lie"):
        Decay(rate)
