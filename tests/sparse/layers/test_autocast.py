"""Under autocast to bfloat16 sparse layers compute as bfloat16 copies would; parameters and their gradients stay float32."""

import copy

import pytest
import torch
from torch import nn

from noctule.core.convert import convert_
from noctule.sparse.layers import SparseConv2d, SparseLinear, ToSparse

LAYERS = {
    "linear": (lambda: SparseLinear(70, 50, density=0.2), (33, 70)),
    "rows of words": (lambda: SparseLinear(70, 50, density=0.2), (3, 11, 70)),
    "convolution": (lambda: SparseConv2d(8, 16, 3, stride=2, padding=1, density=0.2), (5, 8, 9, 9)),
}
bfloat16 = pytest.mark.parametrize("kind", LAYERS)


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


@bfloat16
def test_it_is_a_bfloat16_copy(kind):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape, requires_grad=True)
    half, half_x = copy.deepcopy(layer).bfloat16(), x.detach().bfloat16().requires_grad_()
    half.bias.data, layer.bias.data = (
        half.bias.data.float(),
        half.bias.data.float(),
    )  # the sums and the bias are float32
    with autocast():
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = half(half_x)
    assert torch.equal(y, expected)
    dy = torch.randn(y.shape).bfloat16()
    y.backward(dy)
    expected.backward(dy)
    assert (layer.values.grad.dtype, layer.bias.grad.dtype, x.grad.dtype) == (torch.float32,) * 3
    assert torch.equal(layer.values.grad, half.values.grad.float())
    assert torch.equal(layer.bias.grad, half.bias.grad.float())
    assert torch.equal(x.grad, half_x.grad.float())


@bfloat16
def test_it_is_close_to_float32(kind):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    with autocast():
        y = layer(x)
    expected = layer(x)
    assert expected.dtype == torch.float32
    assert 0 < (y.float() - expected).abs().max() < 0.02 * expected.abs().max()


@bfloat16
def test_inputs_that_are_bfloat16_already_or_float32_again_are_taken(kind):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape).bfloat16()
    with autocast():
        assert torch.equal(layer(x), layer(x.float()))


@bfloat16
def test_other_autocasts_leave_the_product_in_the_dtype_of_the_values(kind):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    with autocast(torch.float16):
        assert torch.equal(layer(x), layer(x.clone()))
        assert layer(x).dtype == torch.float32
        assert layer(x.half()).dtype == torch.float32
    double = make().double()
    with autocast():
        assert double(x).dtype == torch.float64


def test_a_watch_sees_what_its_methods_can_take():
    layer, x, seen = SparseLinear(70, 50, density=0.2), torch.randn(33, 70), []
    layer.watch = lambda *shown: seen.append(shown)
    with autocast():
        layer(x).sum().backward()
    [(dz, x_IB)] = seen
    torch.testing.assert_close(layer.gradient_at(layer.topology, dz, x_IB).float(), layer.values.grad)
    assert layer.respond(x_IB).dtype == torch.float32


def test_an_encoder_trains_as_in_float32():
    def losses(dtype: torch.dtype) -> list[float]:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(8, 7, 32)
        convert_(model, ToSparse(density=0.3))
        optimizer, found = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
                y = model(x)
                loss = (y - x.flip(1)).float().pow(2).mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        model.eval()
        with torch.no_grad(), autocast():
            assert torch.isfinite(model(x)).all()
        return found

    half, single = losses(torch.bfloat16), losses(torch.float32)
    assert half != single
    assert half[-1] < half[0]
    assert half == pytest.approx(single, rel=0.02)
