"""`weight_norm`, `spectral_norm`, `parametrize` and `prune` on the values of a sparse layer."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from noctule.core.remap import exchange
from noctule.sparse.layers import SparseLinear


class Tanh(nn.Module):
    def forward(self, x):
        return x.tanh()

    def right_inverse(self, y):
        return y.atanh()


CHANGES = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "values", dim=None),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer, "values"),
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "values", Tanh()),
    "prune": lambda layer: prune.l1_unstructured(layer, "values", amount=0.5),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_reparametrized_values_are_what_the_layer_works_with(kind):
    layer, x = SparseLinear(20, 30, density=0.2), torch.randn(4, 20)
    before = layer.values.detach().clone()
    CHANGES[kind](layer)
    layer.eval()
    y, values = layer(x), layer.values.detach()
    if kind in ("weight_norm", "parametrize"):
        torch.testing.assert_close(values, before)
    elif kind == "prune":
        assert (values == 0).sum() == 60
    else:
        torch.testing.assert_close(values.norm(), torch.tensor(1.0))
    torch.testing.assert_close(y, layer.to_dense()(x))
    y.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    with pytest.raises(ValueError, match="computed from other parameters"):
        layer.remap_(*exchange(layer.topology, torch.arange(3), layer.topology.missing(3)))
    torch.testing.assert_close(layer(x), y)
    if kind == "prune":
        prune.remove(layer, "values")
    else:
        parametrize.remove_parametrizations(layer, "values")
    assert type(layer) is SparseLinear
    torch.testing.assert_close(layer(x), y)
    layer.remap_(*exchange(layer.topology, torch.arange(3), layer.topology.missing(3)))
