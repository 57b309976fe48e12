"""Separable convolutions: exact at full rank, the best at every other, reported."""

import pytest
import torch
from torch import nn

from noctule.compress.factor import ToSeparable, separable
from noctule.core.convert import convert_


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"padding": 1, "padding_mode": "reflect", "bias": False}]
)
def test_at_full_rank_it_is_the_same_function(options):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(5, 12, 3, **options), torch.randn(2, 5, 8, 8)
    new = separable(layer, 9)
    torch.testing.assert_close(new(x), layer(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new.weight, layer.weight, atol=1e-5, rtol=1e-5)


def test_it_loses_what_the_smallest_singular_values_of_each_channel_hold():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 12, 3)
    by_channel = layer.weight.detach().double().flatten(2).transpose(0, 1)
    squares = torch.linalg.svdvals(by_channel).square()
    for rank in (1, 2, 5):
        assert separable(layer, rank).lost == pytest.approx(float(squares[:, rank:].sum() / squares.sum()), abs=1e-6)


def test_a_layer_that_is_separable_loses_nothing_and_more_than_allowed_is_left():
    torch.manual_seed(0)
    exact, other = nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 3)
    with torch.no_grad():
        exact.weight.copy_(torch.einsum("oc,chw->ochw", torch.randn(8, 6), torch.randn(6, 3, 3)))
    model = nn.Sequential(exact, other, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=4))
    result = convert_(model, ToSeparable(most_lost=0.01))
    assert list(result.changed) == ["0"]
    assert "lost=0.00%" in result.changed["0"]
    assert result.model[0].lost < 1e-9
    assert "more than 1.0%" in result.left["1"]
    assert "no fewer" in result.left["2"]
    assert "groups" in result.left["3"]


def test_bad_ranks_are_refused():
    for rank in (0, 10):
        with pytest.raises(ValueError, match="from 1 to 9"):
            separable(nn.Conv2d(3, 16, 3), rank)
    with pytest.raises(ValueError, match="rank must be"):
        ToSeparable(rank=0)
    with pytest.raises(ValueError, match="most_lost"):
        ToSeparable(most_lost=2.0)
