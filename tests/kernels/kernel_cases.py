"""Sparse matrices, inputs and tolerances for the tests of the kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hypothesis import strategies as st
from torch import Tensor

import emulated
import noctule

if emulated.PATH:  # see test_kernels_emulated.py
    noctule._native = emulated.instead_of("noctule._native")

from noctule.core.topology import Topology
from noctule.kernels import native

SETS = native._native.instruction_sets() if native._native is not None else []
BATCHES = [0, 1, 3, 15, 16, 17, 100, 128, 129, 902]
DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = ["plain", "padded", "misaligned", "strided", "transposed", "expanded"]


@contextmanager
def running(instruction_set: str, threads: int = 1) -> Iterator[None]:
    """With this instruction set, and really this many threads, however little there is to do."""
    before = native._native.instruction_set(), torch.get_num_threads(), native.PARALLEL_FROM
    native._native.use_instruction_set(instruction_set)
    torch.set_num_threads(threads)
    native.PARALLEL_FROM = 0
    try:
        yield
    finally:
        native._native.use_instruction_set(before[0])
        torch.set_num_threads(before[1])
        native.PARALLEL_FROM = before[2]


def matrix(out_features: int, in_features: int, kind: str, seed: int = 0) -> Topology:
    """Places of a kind: none, some, all, one row, one column, or some with empty rows and columns."""
    shape, places = (out_features, in_features), out_features * in_features
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return Topology.random(shape, 0)
    if kind == "all":
        return Topology.random(shape, places)
    if kind == "gaps" and places:
        some = Topology.random(shape, max(1, places // 3), generator=generator)
        rows, columns = some.rows(), some.columns.to(torch.int64)
        keep = (rows % 3 != 0) & (columns % 4 != 1)
        return Topology.from_places(shape, rows[keep], columns[keep])
    return Topology.random(shape, places // 4, generator=generator)


BLOCKS = [(4, 4), (8, 8), (16, 16), (32, 32), (4, 16), (32, 8)]


@st.composite
def grids(draw: st.DrawFn) -> Topology:
    """Places of blocks."""
    sizes, kinds = st.sampled_from([1, 2, 5, 9]), st.sampled_from(["none", "some", "all", "gaps"])
    return matrix(draw(sizes), draw(sizes), draw(kinds), draw(st.integers(0, 9)))


@st.composite
def matrices(draw: st.DrawFn) -> Topology:
    sizes = st.sampled_from([0, 1, 2, 7, 16, 33, 70])
    kinds = st.sampled_from(["none", "some", "all", "gaps"])
    return matrix(draw(sizes), draw(sizes), draw(kinds), draw(st.integers(0, 9)))


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers as (features, batch), lying in memory in another way; what lies between them is NaN."""
    features, batch = x.shape
    if layout == "padded":
        wide = torch.full((features, batch + 5), torch.nan, dtype=x.dtype)
        wide[:, :batch] = x
        return wide[:, :batch]
    if layout == "misaligned":
        flat = torch.full((features * batch + 1,), torch.nan, dtype=x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(features, batch)
    if layout == "strided":
        wide = torch.full((features, 2 * batch), torch.nan, dtype=x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]
    if layout == "transposed":
        return x.t().contiguous().t()
    return x


def given(features: int, batch: int, layout: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if layout == "expanded":
        return numbers(features, 1, seed=seed, dtype=dtype).expand(features, batch)
    return laid_out(numbers(features, batch, seed=seed, dtype=dtype), layout)


def assert_sums(actual: Tensor, exact: Tensor, of_absolutes: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """float32 sums are right within rounding, measured by the sum of the absolute terms; in bfloat16 they are rounded once."""
    assert actual.dtype == dtype
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs()
    allowed = 2e-6 * of_absolutes + 1e-30
    if dtype is torch.bfloat16:
        allowed += exact.abs() / 2**8  # half a place of its eight bits
    assert bool((error <= allowed).all()), float((error / allowed).max())
