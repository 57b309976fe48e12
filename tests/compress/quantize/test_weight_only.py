"""Weights that are stored in few bits: bytes, outputs, files."""

import copy

import pytest
import torch
from torch import nn

import noctule
from noctule.compress.quantize import (
    StaticInt8,
    WeightOnly,
    WeightOnlyLayer,
    calibrate,
    dequantize_weight,
    quantize_weight,
)
from noctule.core.convert import convert_
from noctule.measure import footprint
from noctule.sparse.layers import FuseEpilogue, SparseConv2d, SparseLinear, ToSparse

LAYERS = {
    "linear": (lambda: nn.Linear(24, 20), (5, 24)),
    "linear of sequences": (lambda: nn.Linear(24, 20, bias=False), (2, 3, 24)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, padding="same", dilation=2, groups=2, bias=False), (2, 4, 9, 9)),
    "even kernel": (lambda: nn.Conv2d(4, 8, 2, padding="same"), (4, 9, 9)),
    "sparse linear": (lambda: SparseLinear(24, 20, density=0.3), (5, 24)),
    "sparse convolution": (lambda: SparseConv2d(4, 6, 3, padding=1, density=0.4), (2, 4, 9, 9)),
}
layers = pytest.mark.parametrize("name", LAYERS)


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    make, shape = LAYERS[name]
    return make().eval(), torch.randn(shape)


@layers
@pytest.mark.parametrize("bits", [8, 4, 1])
def test_the_output_is_that_of_the_weight_that_the_codes_mean(name, bits):
    layer, x = made(name)
    twin = copy.deepcopy(layer)
    values = twin.values if hasattr(twin, "values") else twin.weight
    topology = getattr(twin, "topology", None)
    with torch.no_grad():
        values.copy_(dequantize_weight(*quantize_weight(values, bits, topology), topology))
        expected = twin(x)
    small = convert_(nn.Sequential(layer), WeightOnly(bits=bits)).model
    assert isinstance(small[0], WeightOnlyLayer)
    torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bits", "times"), [(8, 3.9), (4, 7.5), (1, 25.0)])
def test_bytes_are_stored(bits, times):
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    before = footprint(model).total_bytes
    convert_(model, WeightOnly(bits=bits))
    assert before / footprint(model).total_bytes > times
    assert sum(t.nbytes for t in model.state_dict().values()) == footprint(model).total_bytes


def test_a_sparse_layer_keeps_16_bits_a_place_and_8_a_value():
    model = nn.Sequential(SparseLinear(1000, 500, density=0.1))
    convert_(model, WeightOnly(bits=8))
    assert footprint(model).total_bytes == 50_000 * 3 + 501 * 4 + 500 * 4 + 500 * 4


@layers
@pytest.mark.parametrize("bits", [8, 4, 1])
def test_a_file_brings_another_model_to_the_same_bits(name, bits, tmp_path):
    layer, x = made(name)
    saved = convert_(nn.Sequential(layer), WeightOnly(bits=bits)).model
    noctule.save_model(tmp_path, saved.state_dict(), {})
    torch.manual_seed(99)
    other = convert_(nn.Sequential(LAYERS[name][0]().eval()), WeightOnly(bits=bits)).model
    assert not torch.equal(other(x), saved(x))
    other.load_state_dict(noctule.load_model(tmp_path)[0])
    assert torch.equal(other(x), saved(x))
    torch.save(saved, tmp_path / "whole.pt")
    for copied in (copy.deepcopy(saved), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert torch.equal(copied(x), saved(x))


def test_a_sparse_state_with_another_number_of_places_loads():
    x = torch.randn(4, 30)
    first, second = (
        convert_(nn.Sequential(SparseLinear(30, 20, weights=n)), WeightOnly(bits=4)).model for n in (100, 71)
    )
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(x), first(x))


def test_damaged_places_are_refused_and_change_nothing():
    model = convert_(nn.Sequential(SparseLinear(30, 20, weights=100)), WeightOnly()).model
    x, state = torch.randn(4, 30), model.state_dict()
    before = model(x)
    bad = {**state, "0.columns": state["0.columns"][:-3].clone()}
    with pytest.raises(RuntimeError, match=r"0: not a topology"):
        model.load_state_dict(bad)
    assert torch.equal(model(x), before)


def test_an_epilogue_that_is_fused_stays():
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)).eval()
    convert_(model, ToSparse(density=0.9))
    convert_(model, FuseEpilogue())
    x = torch.randn(6, 20)
    expected = model(x)
    convert_(model, WeightOnly())
    torch.testing.assert_close(model(x), expected, atol=0.02, rtol=0.05)


def test_half_precision_activations_keep_float32_scales():
    model = convert_(nn.Sequential(nn.Linear(24, 20)), WeightOnly()).model
    x = torch.randn(3, 24)
    expected = model(x)
    model.bfloat16()
    assert model[0].scales.dtype is torch.float32
    assert model(x.bfloat16()).dtype is torch.bfloat16
    torch.testing.assert_close(model(x.bfloat16()).float(), expected, atol=0.05, rtol=0.05)


def test_bits_by_name_leave_the_others():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    done = convert_(model, WeightOnly(bits={"0": 4, "2": 1}))
    assert [type(layer) for layer in model] == [WeightOnlyLayer, nn.Linear, WeightOnlyLayer]
    assert (model[0].bits, model[2].bits) == (4, 1)
    assert done.left["1"].startswith("bits= does not name it")
    with pytest.raises(ValueError, match="this one has no 7"):
        convert_(nn.Sequential(nn.Linear(2, 2)), WeightOnly(bits={"7": 4}))


def test_weights_that_are_not_finite_are_refused_before_any_layer_changes():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        model[1].weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="weights of 1 are NaN or infinite"):
        convert_(model, WeightOnly())
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_layers_without_numbers_stay_and_are_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(20, 20))
    with pytest.warns(UserWarning, match="load its weights first"):
        convert_(model, WeightOnly())


def test_layers_with_hooks_or_other_padding_stay_and_are_named():
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1)
    )
    model[1].register_forward_hook(lambda *_: None)
    left = convert_(model, WeightOnly()).left
    assert "pads with 'circular'" in left["0"]
    assert "hooks" in left["1"]


def test_inputs_of_another_shape_are_refused():
    model = convert_(nn.Sequential(nn.Linear(20, 20)), WeightOnly()).model
    with pytest.raises(ValueError, match="expected inputs of 20 features"):
        model(torch.randn(3, 19))


@pytest.mark.parametrize("rule", ["weights", "static"])
def test_an_encoder_layer_of_torch_works_in_evaluation_and_training(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)).eval()
    x = torch.randn(2, 5, 32)
    expected = model(x)
    convert_(model, WeightOnly() if rule == "weights" else StaticInt8(ranges=calibrate(model, [x])))
    with torch.no_grad():
        fused = model(x)
    torch.testing.assert_close(fused, expected, atol=0.1, rtol=0.1)
    torch.testing.assert_close(model(x), fused, atol=0.1, rtol=0.1)
