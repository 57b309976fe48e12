import pytest
import torch
from torch import nn

from noctule.sparse.pattern import anywhere, largest


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(20, 10)


@pytest.mark.parametrize("weights", [0, 1, 57, 200])
def test_largest_keeps_the_largest(linear, weights):
    topology = largest(linear, weights, None)
    kept = torch.zeros(200, dtype=torch.bool)
    kept[topology.keys()] = True
    magnitude = linear.weight.detach().abs().flatten()
    assert topology.shape == (10, 20)
    assert topology.size == weights == int(kept.sum())
    if 0 < weights < 200:
        assert magnitude[kept].min() >= magnitude[~kept].max()


def test_anywhere_does_not_look_at_the_weights(linear):
    first = anywhere(linear, 57, torch.Generator().manual_seed(3))
    with torch.no_grad():
        linear.weight.zero_()
    again = anywhere(linear, 57, torch.Generator().manual_seed(3))
    assert first == again
    assert first.shape == (10, 20)
    assert first.size == 57
    assert anywhere(linear, 57) != anywhere(linear, 57)


@pytest.mark.parametrize("pattern", [anywhere, largest])
def test_too_many_weights_are_refused(linear, pattern):
    with pytest.raises((ValueError, RuntimeError)):
        pattern(linear, 201, None)
