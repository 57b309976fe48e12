import pytest
import torch
from torch.nn import functional as F

from noctule.sparse.layers import AllReLU


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_the_sign_alternates(layer):
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    slope = -0.6 if layer % 2 else 0.6
    y = AllReLU(0.6, layer=layer)(x)
    assert torch.equal(y, F.leaky_relu(x, slope))
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(x > 0, 1.0, slope))
    assert repr(AllReLU(0.6, layer=layer)) == f"AllReLU(negative_slope={slope:g})"


def test_layers_are_counted_from_one():
    with pytest.raises(ValueError, match="from 1"):
        AllReLU(0.6, layer=0)
