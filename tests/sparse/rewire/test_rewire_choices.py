"""Which connections go and which come: each against a slow, obvious oracle on dense gradients."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from noctule.core.topology import Topology
from noctule.sparse.layers import SparseLinear
from noctule.sparse.rewire import anywhere, guided, rigl, sign_split, smallest, steepest


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(weights: int = 30, dtype: torch.dtype = torch.float32) -> SparseLinear:
    return SparseLinear(12, 10, weights=weights, generator=seeded(), dtype=dtype)


def see(capture, sparse: SparseLinear, parts) -> torch.Tensor:
    """Show some backward passes to it; the dense gradient over all of them, flat."""
    sparse.watch = capture
    weight = sparse.to_dense().weight.detach().requires_grad_()
    for x in parts:
        sparse(x).pow(3).sum().backward()
        F.linear(x, weight, sparse.bias).pow(3).sum().backward()
    return weight.grad.flatten()


def micro_batches(dtype: torch.dtype = torch.float32):
    generator = seeded(5)
    return [torch.randn(size, 12, generator=generator).to(dtype) for size in (4, 7, 1)]


# -- drop ---------------------------------------------------------------------------------------------------------

values = st.lists(st.floats(-9, 9, width=32), max_size=40).map(torch.tensor)
fractions = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.99, 1.0])


@given(values, fractions)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_smallest_go(x, fraction):
    gone = smallest(x, fraction)
    assert gone.numel() == int(fraction * x.numel()) == gone.unique().numel()
    stays = torch.ones(x.numel(), dtype=torch.bool)
    stays[gone] = False
    if gone.numel() and stays.any():
        assert x[gone].abs().max() <= x[stays].abs().min()


@given(values, fractions)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_each_sign_loses_its_own_nearest_to_zero(x, fraction):
    gone = sign_split(x, fraction)
    assert gone.unique().numel() == gone.numel()
    for side in (x > 0, x <= 0):
        mine = gone[side[gone]]
        assert mine.numel() == int(fraction * int(side.sum()))
        rest = side.clone()
        rest[mine] = False
        if mine.numel() and rest.any():
            assert x[mine].abs().max() <= x[rest].abs().min()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_of_equals_the_first_go(dtype):
    x = torch.tensor([1.0, -2.0, 1.0, 0.0, -1.0, 1.0], dtype=dtype)
    assert smallest(nn.Parameter(x), 0.5).sort().values.tolist() == [0, 2, 3]


def test_numbers_of_double_precision_are_told_apart():
    assert smallest(torch.tensor([1.0 + 1e-12, 1.0], dtype=torch.float64), 0.5).tolist() == [1]


def test_what_is_not_a_number_does_not_look_small():
    assert smallest(torch.tensor([torch.nan, 1.0, 2.0, 3.0]), 0.5).tolist() == [1, 2]
    mostly = smallest(torch.tensor([torch.nan, 1.0, torch.nan, torch.nan]), 0.5)
    assert mostly.numel() == 2
    assert 1 in mostly.tolist()


# -- grow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 9, 30])
def test_guided_takes_the_steepest_of_its_candidates(count, dtype):
    sparse = layer(dtype=dtype)
    capture = guided(sparse, seeded(1))
    taken = sparse.topology.keys()
    assert capture.keys.numel() == sparse.weights
    assert not set(capture.keys.tolist()) & set(taken.tolist())
    gradient = see(capture, sparse, micro_batches(dtype)).abs().double()
    chosen = capture.choose(count, taken, taken[:0])
    assert chosen.unique().numel() == chosen.numel() == count
    assert set(chosen.tolist()) <= set(capture.keys.tolist())
    rest = sorted(set(capture.keys.tolist()) - set(chosen.tolist()))
    if count and rest:
        slack = 0.05 if dtype == torch.bfloat16 else 1e-5
        assert gradient[chosen].min() >= (1 - slack) * gradient[rest].max() - slack


def test_guided_candidates_are_drawn_anew_and_uniformly():
    sparse, counts = layer(), torch.zeros(120)
    for seed in range(300):
        counts[guided(sparse, seeded(seed)).keys] += 1
    free = counts[counts > 0]
    assert free.numel() == 90
    assert (free - 100).abs().max() < 5 * (300 * 1 / 3 * 2 / 3) ** 0.5


@pytest.mark.parametrize("tile", [1, 12, 13, 40, 1 << 22])
@pytest.mark.parametrize("count", [0, 1, 9, 90])
def test_steepest_takes_the_steepest_of_all_whatever_the_tiles(tile, count, monkeypatch):
    monkeypatch.setattr(
        sys.modules["noctule.sparse.rewire.rigl"], "TILE_PLACES", tile
    )  # the name itself is the function
    sparse = layer()
    capture = steepest(sparse, seeded())
    taken = sparse.topology.keys()
    gradient = see(capture, sparse, micro_batches()).abs()
    gradient[taken] = -1.0
    chosen = capture.choose(count, taken, taken[:0])
    assert sorted(chosen.tolist()) == sorted(gradient.topk(count).indices.tolist())


@pytest.mark.parametrize("grow", [guided, steepest])
def test_who_saw_no_gradient_grows_nothing(grow):
    sparse = layer()
    keys = sparse.topology.keys()
    assert grow(sparse, seeded()).choose(5, keys, keys[:0]).numel() == 0


def test_anywhere_is_uniform_over_the_missing_places():
    sparse, generator, counts = layer(), seeded(), torch.zeros(120)
    taken = sparse.topology.keys()
    for _ in range(600):
        chosen = anywhere(sparse, generator).choose(9, taken, taken[:0])
        assert chosen.unique().numel() == 9
        counts[chosen] += 1
    assert counts[taken].sum() == 0
    free = torch.ones(120, dtype=torch.bool)
    free[taken] = False
    assert (counts[free] - 60).abs().max() < 5 * 60**0.5


@pytest.mark.parametrize("grow", [anywhere, guided, steepest])
@pytest.mark.parametrize("weights", [0, 1, 60, 115, 120])
def test_sparse_and_full_layers(grow, weights):
    sparse = layer(weights)
    capture = grow(sparse, seeded())
    taken = sparse.topology.keys()
    if callable(capture):
        see(capture, sparse, micro_batches())
    absent = 120 - weights
    chosen = capture.choose(min(9, absent), taken, taken[:0])
    assert chosen.numel() == min(9, absent, weights if grow is guided else absent)
    Topology.from_places((10, 12), torch.cat([taken, chosen]) // 12, torch.cat([taken, chosen]) % 12)


def test_rigl_lets_the_fraction_fall_to_zero():
    method = rigl(until=100, fraction=0.4)
    assert method.fraction(0) == 0.4
    assert method.fraction(50) == pytest.approx(0.2)
    assert method.fraction(100) == 0.0
    assert method.until == 100
