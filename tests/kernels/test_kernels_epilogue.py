"""Bias, activation and dropout in the product: torch's own operations with the mask that was drawn."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BATCHES, DTYPES, SETS, matrix, numbers, running
from torch import Tensor
from torch.nn import functional as F

from noctule import kernels
from noctule.core.topology import Topology
from noctule.kernels import IDENTITY, Epilogue, Kept, native, reference

needs_native = pytest.mark.skipif(not SETS, reason="noctule._native is not built")
SLOPES = [1.0, 0.0, 0.01, 0.6, -0.6]


def mask(epilogue: Epilogue, rows: int, batch: int) -> Tensor:
    return reference.random_words(epilogue.seed, rows, batch) >= epilogue.drop_below


@pytest.mark.parametrize(("dropout", "scale"), [(0.0, 1.0), (0.5, 2.0), (0.75, 4.0), (0.9, 10.0)])
def test_what_dropout_keeps_is_scaled_by_one_over_the_kept_fraction(dropout, scale):
    assert Epilogue(dropout=dropout).scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("product", [reference, pytest.param(native, marks=needs_native)], ids=["reference", "native"])
@pytest.mark.parametrize("p", [0.3, 0.8])
def test_dropout_leaves_the_mean_of_outputs_and_gradients(product, p):
    topology, values, x, bias = matrix(6, 5, "all"), numbers(30), numbers(5, 1).expand(5, 4000), numbers(6, seed=2)
    plain, _ = product.spmm(topology, values, x, bias, IDENTITY, False)
    y, kept = product.spmm(topology, values, x, bias, Epilogue(dropout=p, seed=9), True)
    dz, _ = product.epilogue_backward(torch.ones(6, 4000), kept, False)
    sigma = (p / (1 - p) / 4000) ** 0.5  # of the mean of 4000 draws, relative
    assert ((y.mean(1) / plain[:, 0] - 1).abs() < 5 * sigma).all()
    assert ((dz.mean(1) - 1).abs() < 5 * sigma).all()


@pytest.mark.parametrize("slope", [0.0, 0.1, -0.6])
@pytest.mark.parametrize("implementation", ["reference", *SETS])
def test_the_gradient_at_exactly_zero_is_that_of_torch(implementation, slope):
    # a neuron without weights and with a bias of 0
    topology, dy = Topology.from_places((2, 3), torch.tensor([1, 1]), torch.tensor([0, 2])), numbers(2, 19)
    z = torch.zeros(19, requires_grad=True)
    F.leaky_relu(z, slope).backward(dy[0])
    product = reference if implementation == "reference" else native
    with nullcontext() if product is reference else running(implementation):
        y, kept = product.spmm(topology, numbers(2), numbers(3, 19), torch.zeros(2), Epilogue(slope), True)
        dz, dbias = product.epilogue_backward(dy, kept, True)
    assert (y[0] == 0).all()
    assert torch.equal(dz[0], z.grad)
    torch.testing.assert_close(dbias[0], z.grad.sum())


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_outside_its_range_is_refused(dropout):
    with pytest.raises(ValueError, match="dropout"):
        Epilogue(dropout=dropout)


@given(
    st.sampled_from(SLOPES), st.sampled_from([0.0, 0.3, 0.999]), st.sampled_from([0, 1, 7, 8, 17, 128]), st.booleans()
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_forward_and_backward_are_those_of_torch(slope, dropout, batch, with_bias):
    topology, epilogue = matrix(13, 11, "gaps"), Epilogue(slope, dropout, 42)
    values, x = numbers(topology.size), numbers(11, batch, seed=1)
    bias = numbers(13, seed=2).requires_grad_() if with_bias else None
    product, _ = kernels.spmm(topology, values, x, bias=None if bias is None else bias.detach())
    z = product.requires_grad_()
    shifted = z if bias is None else z + (bias - bias.detach())[:, None]
    expected = F.leaky_relu(shifted, slope) * mask(epilogue, 13, batch) / (1 - dropout)
    y, kept = kernels.spmm(topology, values, x, None if bias is None else bias.detach(), epilogue, keep=True)
    torch.testing.assert_close(y, expected)
    dy = numbers(13, batch, seed=3)
    expected.backward(dy)
    dz, dbias = kernels.epilogue_backward(dy, kept, bias=with_bias)
    torch.testing.assert_close(dz, z.grad)
    if bias is None:
        assert dbias is None
    else:
        torch.testing.assert_close(dbias, bias.grad, atol=1e-5, rtol=1e-5)
    without, nothing = kernels.spmm(topology, values, x, None if bias is None else bias.detach(), epilogue)
    assert torch.equal(without, y)
    assert nothing.positive is None
    assert nothing.kept is None


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("batch", [*BATCHES, 31, 32, 33])
def test_bits_are_those_of_the_reference(instruction_set, batch, dtype):
    topology, bias = matrix(13, 11, "gaps"), numbers(13, seed=2)
    values, x = numbers(topology.size, dtype=dtype), numbers(11, batch, seed=1, dtype=dtype)
    dy = numbers(13, batch, seed=3, dtype=dtype)
    for slope, (dropout, seed) in itertools.product(SLOPES, [(0.0, 0), (0.3, 1), (0.5, 2**62 - 1), (0.9, 2**64 - 1)]):
        epilogue = Epilogue(slope, dropout, seed)
        y, kept = reference.spmm(topology, values, x, bias, epilogue, True)
        with running(instruction_set):
            native_y, native_kept = native.spmm(topology, values, x, bias, epilogue, True)
            dz, dbias = native.epilogue_backward(dy, kept, True)
        torch.testing.assert_close(native_y, y)
        assert native_y.dtype == dz.dtype == dbias.dtype == dtype
        for ours, theirs in ((native_kept.positive, kept.positive), (native_kept.kept, kept.kept)):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)
        expected_dz, expected_dbias = reference.epilogue_backward(dy, kept, True)
        assert torch.equal(dz, expected_dz)
        rounding = 1e-5 if dtype is torch.float32 else 2**-7
        torch.testing.assert_close(dbias, expected_dbias, atol=1e-5, rtol=rounding)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_kept_fraction_is_right_in_all_and_in_every_row(p):
    rows, batch = 100, 1000
    kept = mask(Epilogue(dropout=p, seed=3), rows, batch).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * sigma / (rows * batch) ** 0.5
    assert (kept.mean(1) - (1 - p)).abs().max() < 5 * sigma / batch**0.5
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * sigma / rows**0.5


def test_masks_of_rows_seeds_and_neighbours_are_not_correlated():
    batch = 4096
    seeds = [0, 1, 2, 2**32, 2**62 - 1]
    rows = torch.cat([mask(Epilogue(dropout=0.5, seed=seed), 8, batch).double() * 2 - 1 for seed in seeds])
    correlation = rows @ rows.t() / batch
    correlation.fill_diagonal_(0.0)
    assert correlation.abs().max() < 5 / batch**0.5
    for lag in (1, 2, 8, 16, 128):
        assert ((rows[:, lag:] * rows[:, :-lag]).mean(1)).abs().max() < 5 / (batch - lag) ** 0.5


def test_random_words_are_uniform_in_every_byte():
    words = reference.random_words(11, 50, 1000).flatten()
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(words >> shift & 255, minlength=256).double()
        expected = words.numel() / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert 150 < chi_square < 370  # 255 degrees of freedom: mean 255, deviation 23


def test_a_dropout_that_is_nearly_all_or_nothing():
    assert Epilogue(dropout=1e-12).drop_below == 0
    topology, values, x = matrix(5, 4, "all"), numbers(20), numbers(4, 9)
    y, kept = kernels.spmm(topology, values, x, None, Epilogue(dropout=1e-12), keep=True)
    torch.testing.assert_close(y, kernels.spmm(topology, values, x)[0])
    assert kept.kept is None
    y, _ = kernels.spmm(topology, values, x, None, Epilogue(dropout=1 - 1e-12))
    assert (y == 0).all()


def test_gradients_of_any_layout():
    kept = kernels.spmm(matrix(13, 11, "some"), numbers(35), numbers(11, 17), None, Epilogue(0.1, 0.5, 1), keep=True)[1]
    dy = numbers(13, 17)
    expected = kernels.epilogue_backward(dy, kept, bias=True)
    for odd in (dy.t().contiguous().t(), torch.stack([dy, dy], 2)[:, :, 0], numbers(13, 32)[:, :17].copy_(dy)):
        for a, b in zip(kernels.epilogue_backward(odd, kept, bias=True), expected):
            assert torch.equal(a, b)
    ones = torch.ones(1, 1).expand(13, 17)
    for a, b in zip(
        kernels.epilogue_backward(ones, kept, bias=True), kernels.epilogue_backward(ones.clone(), kept, bias=True)
    ):
        assert torch.equal(a, b)


def test_without_an_epilogue_nothing_is_copied():
    dy = numbers(13, 17)
    dz, dbias = kernels.epilogue_backward(dy, Kept(IDENTITY), bias=False)
    assert dz.data_ptr() == dy.data_ptr()
    assert dbias is None
    dz, dbias = kernels.epilogue_backward(dy, Kept(IDENTITY), bias=True)
    assert dz.data_ptr() == dy.data_ptr()
    torch.testing.assert_close(dbias, dy.sum(1))


@needs_native
@pytest.mark.parametrize("instruction_set", SETS)
def test_not_a_number_stays_one(instruction_set):
    topology, x = matrix(3, 2, "all"), torch.tensor([[torch.nan, torch.inf, -torch.inf], [0.0, 0.0, 0.0]])
    values = torch.tensor([1.0, 0.0, -1.0, 0.0, 2.0, 1.0])
    with running(instruction_set):
        for slope in (1.0, 0.5, -0.5):
            y, _ = native.spmm(topology, values, x, None, Epilogue(slope), False)
            assert torch.equal(torch.isnan(y), torch.isnan(F.leaky_relu(values.view(3, 2) @ x, slope)))
