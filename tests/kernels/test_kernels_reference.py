"""The reference is the dense product on the stored places, in every dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BLOCKS, grids, matrices, matrix, numbers
from torch import Tensor

from noctule import kernels
from noctule.core.topology import Topology
from noctule.kernels import IDENTITY, Epilogue, reference


def dense(topology: Topology, values: Tensor) -> Tensor:
    full = torch.zeros(topology.places, dtype=values.dtype)
    full[topology.keys()] = values
    return full.view(topology.shape)


@given(matrices(), st.sampled_from([0, 1, 7, 33]))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_reference_is_dense(topology, batch):
    (out_features, in_features), n = topology.shape, topology.size
    values, bias = numbers(n).double(), numbers(out_features, seed=1).double()
    x, dy = numbers(in_features, batch, seed=2).double(), numbers(out_features, batch, seed=3).double()
    weight = dense(topology, values)
    y, kept = reference.spmm(topology, values, x, bias, IDENTITY, True)
    torch.testing.assert_close(y, weight @ x + bias[:, None])
    assert kept.positive is None
    assert kept.kept is None
    torch.testing.assert_close(reference.spmm_t(topology, values, dy), weight.t() @ dy)
    torch.testing.assert_close(reference.sddmm(topology, dy, x), (dy @ x.t()).flatten()[topology.keys()])


@given(grids(), st.sampled_from([(2, 3), *BLOCKS]), st.sampled_from([0, 1, 7]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_blocks_are_the_weights_that_they_hold(topology, block, batch):
    (r, c), (rows, columns), n = block, topology.shape, topology.size
    values, bias = numbers(n, r, c).double(), numbers(rows * r, seed=1).double()
    x, dy = numbers(columns * c, batch, seed=2).double(), numbers(rows * r, batch, seed=3).double()
    grid = torch.zeros(rows, columns, r, c, dtype=torch.float64)
    grid[topology.rows(), topology.columns.long()] = values
    weight = grid.permute(0, 2, 1, 3).reshape(rows * r, columns * c)
    torch.testing.assert_close(reference.spmm(topology, values, x, bias, IDENTITY, True)[0], weight @ x + bias[:, None])
    torch.testing.assert_close(reference.spmm_t(topology, values, dy), weight.t() @ dy)
    expected = (dy @ x.t()).view(rows, r, columns, c).permute(0, 2, 1, 3)[topology.rows(), topology.columns.long()]
    dvalues, dbias = reference.gradients(topology, dy, x, True)
    torch.testing.assert_close(dvalues, expected)
    torch.testing.assert_close(dbias, dy.sum(1))


def test_the_chunks_do_not_matter(monkeypatch):
    topology, batch = matrix(20, 30, "some"), 17
    values, x, dy = numbers(topology.size), numbers(30, batch), numbers(20, batch)

    def everything():
        y, _ = reference.spmm(topology, values, x, None, IDENTITY, False)
        return y, reference.spmm_t(topology, values, dy), reference.sddmm(topology, dy, x)

    whole = everything()
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 40)
    for a, b in zip(whole, everything()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_up_in_float32(dtype):
    topology = matrix(1, 4096, "all")
    values, x = torch.ones(4096, dtype=dtype), torch.ones(4096, 3, dtype=dtype)
    y, _ = kernels.spmm(topology, values, x)
    assert y.dtype == dtype
    assert (y == 4096).all()  # adding one by one in half precision would stop at 256 or 2048
    dy = torch.ones(1, 4096, dtype=dtype)
    gradient = kernels.sddmm(matrix(1, 1, "all"), dy, dy)
    assert gradient.dtype == dtype
    assert gradient == 4096
    _, dbias = kernels.epilogue_backward(dy, kernels.Kept(Epilogue()), bias=True)
    assert dbias == 4096


def test_random_words_are_those_of_a_plain_loop():
    def word(seed: int, row: int, position: int) -> int:
        long, word = 2**64 - 1, 2**32 - 1
        z = (seed + (row + 1) * 0x9E3779B97F4A7C15) & long
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & long
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & long
        z ^= z >> 31
        x = (position + z) & word
        x = (x ^ x >> 16) * 0x21F0AAAD & word
        x = ((x ^ x >> 15) + (z >> 32)) & word
        x = (x ^ x >> 15) * 0xD35A2D97 & word
        return x ^ x >> 15

    for seed in (0, 1, 2**62 - 1, 2**63, 2**64 - 1):
        assert reference.random_words(seed, 3, 5).tolist() == [[word(seed, r, c) for c in range(5)] for r in range(3)]
