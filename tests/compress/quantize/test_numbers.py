"""The number formats: errors are half a step at most, zeros are exact, packing loses nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from noctule.compress.quantize import (
    dequantize,
    dequantize_weight,
    grid,
    quantize,
    quantize_weight,
)
from noctule.compress.quantize.numbers import pack, unpack
from noctule.core.topology import Topology

numbers = st.floats(-(2.0**90), 2.0**90, width=32)
weights = arrays.arrays("float32", arrays.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=numbers)


@given(weights, st.sampled_from([8, 4]))
@settings(max_examples=60, deadline=None)
def test_a_weight_is_off_by_half_a_step_at_most_and_zero_is_exact(weight, bits):
    w = torch.from_numpy(weight)
    codes, scales = quantize_weight(w, bits)
    again = dequantize_weight(codes, scales)
    steps = scales.view(-1, *[1] * (w.dim() - 1))
    assert codes.dtype is torch.int8
    assert int(codes.abs().max()) <= 2 ** (bits - 1) - 1
    assert bool(((again - w).abs() <= 0.5001 * steps).all())
    assert bool((again[w == 0.0] == 0.0).all())


@given(weights)
@settings(max_examples=30, deadline=None)
def test_quantising_twice_is_quantising_once(weight):
    once = dequantize_weight(*quantize_weight(torch.from_numpy(weight)))
    torch.testing.assert_close(dequantize_weight(*quantize_weight(once)), once, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("bits", [8, 4, 1])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (4, 3, 3, 3), (2, 0), (0, 4)])
def test_packing_loses_nothing_and_takes_the_bytes_it_should(bits, shape):
    codes, _ = quantize_weight(torch.randn(shape, generator=torch.Generator().manual_seed(1)), bits)
    packed = pack(codes, bits)
    assert packed.nbytes == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack(packed, bits, tuple(codes.shape)), codes)


def test_a_row_of_zeros_stays_zero_in_all_bits():
    w = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    for bits in (8, 4, 1):
        again = dequantize_weight(*quantize_weight(w, bits))
        assert again[0].tolist() == [0.0, 0.0]


def test_one_bit_has_the_mean_magnitude_which_is_the_best_scale():
    w = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_weight(w, 1)
    assert set(codes.flatten().tolist()) == {-1, 1}
    best, *others = ((codes * (scales * factor)[:, None] - w).square().sum() for factor in (1.0, 0.98, 1.02))
    assert best < min(others)


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_sparse_values_have_the_scales_of_their_rows(bits):
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    whole = Topology.from_keys((5, 8), torch.arange(40))
    codes, scales = quantize_weight(w, bits)
    codes_N, scales_O = quantize_weight(w.flatten(), bits, whole)
    assert torch.equal(codes_N.view(5, 8), codes)
    torch.testing.assert_close(scales_O, scales)
    torch.testing.assert_close(dequantize_weight(codes_N, scales_O, whole).view(5, 8), dequantize_weight(codes, scales))


def test_a_sparse_row_without_weights_has_a_scale():
    topology = Topology.from_places((3, 4), torch.tensor([0, 2]), torch.tensor([1, 3]))
    for bits in (8, 4, 1):
        codes, scales = quantize_weight(torch.tensor([2.0, -3.0]), bits, topology)
        assert scales.isfinite().all()
        torch.testing.assert_close(dequantize_weight(codes, scales, topology), torch.tensor([2.0, -3.0]))


@given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32), st.sampled_from([8, 7]))
@settings(max_examples=100, deadline=None)
def test_an_activation_is_off_by_half_a_step_at_most_and_zero_is_exact(a, b, bits):
    low, high = min(a, b), max(a, b)
    to = grid(low, high, bits=bits)
    x = torch.linspace(min(low, 0.0), max(high, 0.0), 1001)
    codes = quantize(x, to)
    assert codes.dtype is torch.uint8
    assert bool(((dequantize(codes, to) - x).abs() <= 0.501 * to.scale + 1e-6 * abs(x)).all())
    assert dequantize(quantize(torch.zeros(1), to), to).item() == 0.0


def test_outside_of_the_range_activations_are_cut():
    to = grid(-1.0, 1.0)
    ends = dequantize(quantize(torch.tensor([-50.0, 50.0]), to), to)
    torch.testing.assert_close(ends, torch.tensor([-1.0, 1.0]), atol=0.501 * to.scale, rtol=0.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_weight(torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(torch.tensor([1.0, bad]), grid(-1.0, 1.0))
    with pytest.raises(ValueError, match="finite"):
        grid(0.0, abs(bad))


def test_bits_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="8, 4 or 1 bits, got 3"):
        quantize_weight(torch.ones(1, 1), 3)
    with pytest.raises(ValueError, match="7 or 8 bits, got 4"):
        grid(0.0, 1.0, bits=4)
