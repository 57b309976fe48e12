import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.sparse.layers import SparseLinear
from noctule.sparse.layers.layout import feature_major, row_major

SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=3)


def laid(leading: list[int], features: int, how: str) -> torch.Tensor:
    x = torch.randn(*leading, features)
    if how == "rows":
        return x
    batch = x[..., 0].numel()
    wide = torch.empty(features, batch + 5)[:, :batch].copy_(x.reshape(batch, features).t())
    return wide.t().view(x.shape)


@settings(deadline=None, max_examples=80)
@given(leading=SHAPES, features=st.integers(1, 40), how=st.sampled_from(["rows", "features"]))
def test_numbers_and_gradients_stay_and_the_strides_are_as_asked(leading, features, how):
    x, dy = laid(leading, features, how), torch.randn(*leading, features)
    for change in (feature_major, row_major):
        leaf = x.detach().requires_grad_()
        y = change(leaf)
        assert torch.equal(y, x)
        y.backward(dy)
        assert torch.equal(leaf.grad, dy)
        y_BI = y.detach().reshape(-1, features)
        assert y_BI.shape[0] == 1 or features == 1 or y_BI.stride(0 if change is feature_major else 1) == 1
        assert change(y.detach()).data_ptr() == y.data_ptr()  # what lies so already is not copied


def test_a_sparse_layer_and_what_follows_it_agree_on_the_gradients():
    layer = SparseLinear(32, 48, density=0.2)
    results = []
    for change in (lambda x: x, row_major):
        x = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        shared = feature_major(x) if change is row_major else x
        loss = (change(layer(shared)).sin() + change(layer(shared))).square().sum()
        results.append(torch.autograd.grad(loss, [x, layer.values, layer.bias]))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
    assert results[1][0].stride(-1) == 1  # back in the layout of x


@pytest.mark.parametrize("change", [feature_major, row_major])
def test_a_compiled_graph_goes_through_without_a_break(change):
    x = torch.randn(6, 10)
    x = x if change is feature_major else x.t().contiguous().t()
    compiled = torch.compile(change, backend="eager", fullgraph=True)(x)
    assert torch.equal(compiled, x)
    assert compiled.stride() == change(x).stride()
