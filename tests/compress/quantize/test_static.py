"""Integer layers: their sums are those of Python's integers, their ranges those that were observed."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import noctule
from noctule.compress.quantize import (
    Histogram,
    Int8Layer,
    StaticInt8,
    calibrate,
    dequantize,
    fold_batch_norms,
    grid,
    least_error,
    min_max,
    percentile,
    quantize,
)
from noctule.core.convert import convert_
from noctule.measure import footprint
from noctule.models import cnn, resnet
from noctule.sparse.layers import SparseConv2d, SparseLinear, ToSparse

LAYERS = {
    "linear": (lambda: nn.Linear(70, 20), (5, 70)),
    "wide linear": (lambda: nn.Linear(900, 20), (5, 900)),
    "linear of sequences": (lambda: nn.Linear(24, 20, bias=False), (2, 3, 24)),
    "convolution": (lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1), (2, 16, 9, 9)),
    "wide convolution": (lambda: nn.Conv2d(96, 16, 3, padding=1, bias=False), (2, 96, 5, 5)),
    "groups": (lambda: nn.Conv2d(16, 16, 3, padding="same", dilation=2, groups=16), (2, 16, 9, 9)),
    "one image": (lambda: nn.Conv2d(16, 16, 2, padding="same"), (16, 9, 9)),
    "sparse linear": (lambda: SparseLinear(700, 20, density=0.9), (5, 700)),
    "sparse convolution": (lambda: SparseConv2d(16, 24, 3, padding=1, density=0.4), (2, 16, 9, 9)),
}
layers = pytest.mark.parametrize("name", LAYERS)


def made(name: str, activation_bits: int, low: float = -2.0) -> tuple[nn.Module, Int8Layer, torch.Tensor]:
    torch.manual_seed(3)
    make, shape = LAYERS[name]
    layer, x = make().eval(), torch.empty(shape).uniform_(low, 3.0)
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    convert_(model, StaticInt8(ranges=calibrate(model, [x]), activation_bits=activation_bits))
    return layer, model[0], x


def reference(layer: nn.Module, small: Int8Layer, codes: torch.Tensor) -> torch.Tensor:
    """The sums in 64-bit integers, in float64."""
    dense = layer.to_dense() if hasattr(layer, "to_dense") else layer
    integers = small.integers().long()
    if small.places is not None:
        whole = torch.zeros(dense.weight.numel(), dtype=torch.int64)
        integers = whole.index_put((small.places.keys(),), integers).view(dense.weight.shape)
    x = codes.long() - small.grid.zero_point
    if isinstance(dense, nn.Linear):
        return (x.unsqueeze(-2) * integers).sum(-1)
    dense = copy.deepcopy(dense).double()
    dense.bias = None
    with torch.no_grad():
        dense.weight.copy_(integers)
        return dense(x.double()).round().long()


@layers
@pytest.mark.parametrize("activation_bits", [8, 7])
def test_sums_are_those_of_integers(name, activation_bits):
    layer, small, x = made(name, activation_bits)
    codes = quantize(x, small.grid)
    expected = reference(layer, small, codes)
    assert torch.equal(small.sums(codes, small.grid).long(), expected)
    rows = (-1,) if expected.dim() == x.dim() and name.endswith(("linear", "sequences")) else (-1, 1, 1)
    scales = (small.scales.double() * small.grid.scale).view(rows)
    y = expected * scales + (0.0 if small.bias is None else small.bias.double().view(rows))
    torch.testing.assert_close(small(x).double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation_bits", [8, 7])
def test_the_largest_numbers_do_not_saturate(activation_bits):
    layer = nn.Linear(512, 16, bias=False)
    nn.init.ones_(layer.weight)
    model = nn.Sequential(layer).eval()
    x = torch.ones(16, 512)
    convert_(model, StaticInt8(ranges=calibrate(model, [x]), activation_bits=activation_bits))
    torch.testing.assert_close(model(x), torch.full((16, 16), 512.0))


@layers
@pytest.mark.parametrize("activation_bits", [8, 7])
def test_no_samples_give_no_outputs(name, activation_bits):
    layer, small, x = made(name, activation_bits)
    if name != "one image":
        assert small(x[:0]).shape == layer(x[:0]).shape


@layers
def test_eight_bits_are_near_the_layer_in_floats(name):
    layer, small, x = made(name, 8)
    with torch.no_grad():
        y = layer(x)
    assert float((small(x) - y).square().mean() / y.square().mean()) < 1e-3


@layers
def test_a_state_brings_a_fresh_model_to_the_same_bits(name, tmp_path):
    _, small, x = made(name, 7)
    model = nn.Sequential(small)
    expected = model(x)
    noctule.save_model(tmp_path, model.state_dict(), {})
    torch.manual_seed(9)
    other = nn.Sequential(LAYERS[name][0]()).eval()
    convert_(other, StaticInt8(ranges={"0": (0.0, 1.0)}))
    other(x)  # packs a weight that is replaced below
    other.load_state_dict(noctule.load_model(tmp_path)[0])
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(other)(x), expected)


def images(count: int = 64) -> torch.Tensor:
    return torch.rand(count, 784, generator=torch.Generator().manual_seed(1))


def trained_cnn() -> nn.Module:
    torch.manual_seed(0)
    model = cnn((1, 28, 28), 10, channels=(16, 32))
    for _ in range(3):
        model(images())
    return model.eval()


def test_a_network_is_four_times_smaller_and_computes_nearly_the_same():
    model, x = trained_cnn(), images()
    expected, before = model(x), footprint(model).total_bytes
    result = convert_(model, StaticInt8(ranges=calibrate(model, x.split(16)), narrowest=1))
    assert not [name for name in result.left if "narrower" in result.left[name]]
    assert before / footprint(model).total_bytes > 3.0
    error = (model(x) - expected).square().mean() / expected.square().mean()
    assert error.item() < 2e-3


def test_narrow_layers_stay_and_the_better_recipe_is_named():
    model, x = trained_cnn(), images()
    left = convert_(model, StaticInt8(ranges=calibrate(model, [x]))).left
    assert sum("WeightOnly(bits=8)" in why for why in left.values()) == 2  # one channel in, ten classes out


def test_a_sparse_network_becomes_integers_too():
    model, x = trained_cnn(), images()
    convert_(model, ToSparse(density=0.3))
    expected = model(x)
    convert_(model, StaticInt8(ranges=calibrate(model, [x]), narrowest=1))
    kinds = [m for m in model.modules() if isinstance(m, Int8Layer)]
    assert all(m.places is not None for m in kinds)
    assert float((model(x) - expected).square().mean() / expected.square().mean()) < 5e-3


# -- calibration ------------------------------------------------------------------------------------------------------


def test_a_histogram_counts_the_same_in_any_order_and_portions():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 2, 4000)
    first, second = Histogram(), Histogram()
    for part in x.split(1000):
        first.add(part)
    second.add(x)
    assert (first.low, first.high) == (x.min().item(), x.max().item()) == min_max(second)
    assert first.counts.sum() == second.counts.sum() == 4000
    assert first.bound == second.bound
    assert float((first.counts.cumsum(0) - second.counts.cumsum(0)).abs().max()) <= 40.0


def test_observers_leave_out_outliers_and_the_least_error_is_least():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(2))
    x[0] = 60.0
    seen = Histogram()
    seen.add(x)

    def error(ends):
        return F.mse_loss(dequantize(quantize(x, to := grid(*ends)), to), x)

    assert min_max(seen)[1] == 60.0
    assert percentile(seen)[1] < 6.0
    assert percentile(seen, share=1.0)[1] > 59.0
    low, high = percentile(seen, share=0.9)
    assert float(((x >= low) & (x <= high)).float().mean()) == pytest.approx(0.9, abs=0.01)
    least = error(least_error(seen))
    assert least <= error(min_max(seen)) * 1.001
    assert least <= error(percentile(seen)) * 1.001


def test_observers_are_functions_and_ranges_plain_numbers():
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20)).eval()
    ranges = calibrate(model, [(torch.randn(50, 20), torch.zeros(50))], observer=partial(percentile, share=0.99))
    assert list(ranges) == ["0", "2"]
    assert ranges["2"][0] == 0.0
    assert json.loads(json.dumps(ranges)) == ranges
    assert not model[0]._forward_hooks


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 20)

    def forward(self, x):
        return self.layer(input=x)


def test_a_layer_that_is_called_by_keyword_is_observed():
    assert calibrate(ByKeyword().eval(), [torch.linspace(0.0, 2.0, 40).view(2, 20)]) == {"layer": [0.0, 2.0]}


def test_calibration_refuses_what_would_give_wrong_ranges():
    model = nn.Sequential(nn.Linear(20, 20)).eval()
    with pytest.raises(ValueError, match="no batch"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="batch 1 has samples of shape \\(19,\\)"):
        calibrate(model, [torch.ones(2, 20), torch.ones(2, 19)])
    with pytest.raises(ValueError, match="does not go through the model"):
        calibrate(model, [torch.ones(2, 19)])
    with pytest.raises(ValueError, match="got dict"):
        calibrate(model, [{"x": torch.ones(2, 20)}])
    with pytest.raises(ValueError, match="NaN or infinite"):
        calibrate(model, [torch.full((2, 20), torch.nan)])
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        calibrate(model.train(), [torch.ones(2, 20)])
    assert not model[0]._forward_hooks


def test_static_int8_refuses_before_any_layer_changes():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)).eval()
    ranges = calibrate(model, [torch.randn(2, 16, 8, 8)])
    with pytest.raises(ValueError, match="dynamic int8"):
        convert_(model, StaticInt8())
    with pytest.raises(ValueError, match="has no 5"):
        convert_(model, StaticInt8(ranges={"5": ranges["0"]}))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        convert_(model.train(), StaticInt8(ranges=ranges))
    with torch.no_grad():
        model.eval()[1].weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="weights of 1 are NaN or infinite"):
        convert_(model, StaticInt8(ranges=ranges))
    assert [type(m) for m in model] == [nn.Conv2d, nn.Conv2d]


def test_inputs_that_no_integer_is_are_refused():
    _, small, x = made("linear", 8)
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        small(x)
    with pytest.raises(ValueError, match="expected inputs of 70 features"):
        small(x[:, :69])


# -- batch norms ------------------------------------------------------------------------------------------------------


def shaken(model: nn.Module) -> nn.Module:
    """With statistics, scales and shifts that are not those of the start."""
    generator = torch.Generator().manual_seed(4)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            for t in (m.running_mean, m.running_var, *m.parameters()):
                t.data.copy_(torch.rand(t.shape, generator=generator) + 0.3)
    return model.eval()


MODELS = {
    "resnet": (lambda: resnet((1, 28, 28), 10, depth=8), (3, 784), 9, 0),
    "cnn": (lambda: cnn((1, 28, 28), 10, channels=(8, 8)), (3, 784), 0, 3),
    "linear": (lambda: nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), (5, 9), 1, 0),
    "no bias, no affine": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)),
        (5, 2, 6, 6),
        1,
        0,
    ),
    "sparse": (lambda: nn.Sequential(SparseConv2d(2, 8, 3, density=0.5), nn.BatchNorm2d(8)), (5, 2, 6, 6), 1, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_folding_changes_nothing_but_the_number_of_norms(name):
    make, shape, folded, left = MODELS[name]
    torch.manual_seed(0)
    model = shaken(make())
    x = torch.rand(shape)
    expected = model(x)
    result = fold_batch_norms(model)
    assert (len(result.folded), len(result.left)) == (folded, left)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(m.training for m in model.modules())
    assert sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules()) == left


class Branching(nn.Module):
    """A forward that cannot be traced, with a pair in a sequence; outside, a layer that two read."""

    def __init__(self, traced: bool):
        super().__init__()
        self.traced = traced
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.body(x)
        if not self.traced and x.sum() > 1e9:
            return x
        y = self.layer(x)
        return y + self.norm(y)


@pytest.mark.parametrize("traced", [True, False])
def test_an_output_that_others_read_is_not_folded_and_a_forward_that_branches_is_folded_by_sequences(traced):
    model = shaken(Branching(traced))
    x = torch.randn(5, 4)
    expected = model(x)
    result = fold_batch_norms(model)
    assert result.folded == {"body.1": "body.0"}
    assert list(result.left) == ["norm"]
    torch.testing.assert_close(model(x), expected)


def test_a_weight_that_another_layer_uses_too_is_not_folded():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = shaken(nn.Sequential(first, nn.BatchNorm1d(4), nn.ReLU(), second))
    x = torch.randn(5, 4)
    expected = model(x)
    assert "tied" in fold_batch_norms(model).left["1"]
    torch.testing.assert_close(model(x), expected)


def test_a_pair_that_stands_in_two_places_is_not_folded():
    pair = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for model in (nn.Sequential(pair, pair), nn.Sequential(pair[0], pair[1], nn.ReLU(), nn.Sequential(*pair))):
        x = torch.randn(5, 4)
        expected = shaken(model)(x)
        assert not fold_batch_norms(model).folded
        torch.testing.assert_close(model(x), expected)


def test_a_model_in_training_mode_is_not_folded():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        fold_batch_norms(model)
    assert isinstance(model[1], nn.BatchNorm1d)
