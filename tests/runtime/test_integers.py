"""Products of int8 are those of plain whole numbers, on every instruction set, and nothing else is written or read."""

import ctypes
import mmap
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product as pairs_of
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import emulated

if emulated.PATH:  # see test_integers_emulated.py
    emulated.instead_of("noctule.runtime._native")

from noctule.runtime import _native, integers
from noctule.runtime.integers import BlockWeight, DenseWeight, Epilogue, Operands, SparseWeight

Array = NDArray[Any]
SLACK = 64  # bytes that kernels may read behind the end of x
MARK = 0xA5


@pytest.fixture(autouse=True)
def same_set_afterwards() -> Iterator[None]:
    before = _native.instruction_set()
    yield
    _native.use_instruction_set(before)


def guarded(n: int, dtype: Any = np.uint8, slack: int = 0) -> Array:
    """n elements and slack; behind them lies memory that must not be touched."""
    size = n * np.dtype(dtype).itemsize + slack
    page = mmap.PAGESIZE
    inner = -(-size // page) * page
    memory = mmap.mmap(-1, inner + page)
    whole = np.frombuffer(memory, np.uint8)
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.ctypes.data + inner), ctypes.c_size_t(page), 0)
    return whole[inner - size : inner - size + n * np.dtype(dtype).itemsize].view(dtype)


class Case(NamedTuple):
    """x with lines that overlap, and a weight (O, K) with the place of each column in x."""

    x: Array
    weight: Array
    offsets: Array
    ld: int
    x_step: int
    columns: int
    lines: int
    epilogue: Epilogue

    def accumulated(self) -> Array:
        """(O, lines, columns)"""
        n, line = np.arange(self.columns), np.arange(self.lines)[:, None]
        at = self.offsets[:, None, None] * self.ld + line * self.x_step + n
        sums = np.tensordot(self.weight.astype(np.int64), self.x[at].astype(np.int64), 1)
        return sums + self.epilogue.correction.astype(np.int64)[:, None, None]

    def expected(self) -> Array:
        e = self.epilogue
        v = self.accumulated().astype(np.float32) * e.scale[:, None, None] + e.bias[:, None, None]
        v = np.where(v > 0, v, v * np.float32(e.slope)) if e.slope != 1 else v
        if e.inverse is None:
            return v
        codes = np.rint(v * np.float32(e.inverse)) + np.float32(e.zero)
        return np.clip(codes, 0, e.highest).astype(np.uint8)


def epilogue_of(rng: np.random.Generator, rows: int, store: str) -> Epilogue:
    return Epilogue(
        correction=rng.integers(-(10**6), 10**6, rows),
        scale=rng.uniform(1e-4, 1e-2, rows),
        bias=rng.normal(0, 3, rows),
        slope=float(rng.choice([0.0, 1.0, 0.1])),
        inverse=None if store == "floats" else float(rng.uniform(0.1, 10)),
        zero=int(rng.integers(0, 256)),
        highest=int(rng.choice([255, 127])),
    )


@st.composite
def cases(draw: st.DrawFn, *, blocks: bool = False) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, places = draw(st.integers(1, 40)), draw(st.integers(1, 90))
    columns, lines = draw(st.integers(1, 70)), draw(st.integers(1, 3))
    store = draw(st.sampled_from(["floats", "codes"]))
    weights = draw(st.sampled_from(["any", "small", "largest", "one sign"]))
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]))
    if blocks:
        places = -(-places // 4) * 4
    if weights in ("any", "small"):
        w = np.clip(np.rint(rng.normal(0, 60 if weights == "any" else 8, (rows, places))), -127, 127)
    else:
        w = 127 * np.sign(rng.uniform(-1, 1, (rows, places)) if weights == "largest" else np.ones((rows, places)))
    kept = rng.random((rows, places // 4 if blocks else places)) < density
    w = w * (np.repeat(kept, 4, 1) if blocks else kept)
    many = draw(st.integers(places, 2 * places))  # rows of x
    offsets = np.arange(places) if blocks or draw(st.booleans()) else np.sort(rng.permutation(many)[:places])
    ld, x_step = draw(st.sampled_from([1, columns, columns + 3])), draw(st.integers(0, 80))
    size = int(offsets.max()) * ld + (lines - 1) * x_step + columns
    x = guarded(size, slack=SLACK)
    x[:] = 255 if weights == "largest" else rng.integers(0, 256, size)
    return Case(x, w.astype(np.int8), offsets, ld, x_step, columns, lines, epilogue_of(rng, rows, store))


def computed(
    case: Case, weight: Any, x: Array | None = None, ld: int | None = None, x_step: int | None = None
) -> Array:
    """The result (O, lines, columns) of the calls, after a look at what lies around it."""
    rows, e = len(case.weight), case.epilogue
    dtype = np.float32 if e.inverse is None else np.uint8
    y_ld, y_step = case.lines * (case.columns + 5) + 1, case.columns + 5
    size = (rows - 1) * y_ld + (case.lines - 1) * y_step + case.columns
    y = guarded(size, dtype)
    y.view(np.uint8)[:] = MARK
    scratch = guarded(weight.scratch_bytes(case.columns))
    calls = weight.calls(
        Operands(
            x=(case.x if x is None else x).ctypes.data,
            ld=case.ld if ld is None else ld,
            x_step=case.x_step if x_step is None else x_step,
            y=y.ctypes.data,
            y_ld=y_ld,
            y_step=y_step,
            columns=case.columns,
            lines=case.lines,
            scratch=scratch.ctypes.data,
        ),
        e,
    )
    for function, arguments in calls:
        function(*arguments)
    at = np.arange(rows)[:, None, None] * y_ld + np.arange(case.lines)[:, None] * y_step + np.arange(case.columns)
    around = np.ones(size, bool)
    around[at] = False
    assert (y[around].view(np.uint8) == MARK).all()
    return y[at]


def sparse(case: Case, highest: int = 255) -> SparseWeight:
    row, column = np.nonzero(case.weight)
    row_ptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(case.weight)))])
    return SparseWeight(row_ptr, case.offsets[column], case.weight[row, column], highest)


def same_on_every_set(case: Case, compute: Callable[[Case], Array]) -> None:
    expected = case.expected()
    for name in _native.instruction_sets():
        _native.use_instruction_set(name)
        np.testing.assert_array_equal(compute(case), expected, name)


NONE, MUCH = (0.0, 0.0), (1e9, 1e9)
COSTS = {"rounds": (NONE, MUCH), "records": (MUCH, NONE)}


@pytest.mark.parametrize("kernel", COSTS)
@given(case=cases())
@settings(deadline=None)
def test_sparse_products_are_those_of_whole_numbers(kernel: str, case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, cost in zip(("_ROUNDS", "_RECORDS"), COSTS[kernel], strict=True):
            patch.setattr(integers, name, cost)
        same_on_every_set(case, lambda c: computed(c, sparse(c)))


@given(case=cases())
@settings(deadline=None)
def test_dense_products_are_those_of_whole_numbers(case: Case) -> None:
    same_on_every_set(case, lambda c: computed(c, DenseWeight(c.weight, c.offsets)))


@given(case=cases(blocks=True))
@settings(deadline=None)
def test_products_of_blocks_are_those_of_whole_numbers(case: Case) -> None:
    features = case.weight.shape[1]
    apart = case._replace(ld=case.columns, x_step=0, lines=1, x=guarded(features * case.columns, slack=SLACK))
    apart.x[:] = np.resize(case.x, features * case.columns)
    row, block = np.nonzero(apart.weight.reshape(len(apart.weight), -1, 4).any(2))
    row_ptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(apart.weight)))])
    values = apart.weight.reshape(len(apart.weight), -1, 4)[row, block]

    def compute(c: Case) -> Array:
        x = guarded(features * c.columns, slack=SLACK)
        function, arguments = integers.interleave(c.x.ctypes.data, c.ld, features, c.columns, x.ctypes.data)
        function(*arguments)
        assert (x.reshape(-1, c.columns, 4) == c.x.reshape(-1, 4, c.columns).swapaxes(1, 2)).all()
        return computed(c, BlockWeight(row_ptr, block, values), x, c.columns)

    same_on_every_set(apart, compute)


@pytest.mark.parametrize(("sign", "columns"), list(pairs_of([1, -1, 0], [1, 40])))
def test_long_rows_of_the_largest_numbers_do_not_overflow(sign: int, columns: int) -> None:
    places, rng = 3000, np.random.default_rng(0)
    weight = np.full((3, places), 127) * (sign or rng.choice([-1, 1], (3, places)))
    x = guarded(places * columns, slack=SLACK)
    x[:] = 255
    e = replace(epilogue_of(rng, 3, "floats"), slope=1.0)
    case = Case(x, weight.astype(np.int8), np.arange(places), columns, 0, columns, 1, e)
    same_on_every_set(case, lambda c: computed(c, sparse(c)))
    same_on_every_set(case, lambda c: computed(c, DenseWeight(c.weight)))


def test_codes_of_seven_bits_share_sums_of_16_bits_among_more_weights() -> None:
    rng = np.random.default_rng(1)
    x = guarded(64 * 32, slack=SLACK)
    x[:] = 127
    weight = np.where(rng.random((16, 64)) < 0.5, 127, 0) * rng.choice([-1, 1], (16, 64))
    case = Case(x, weight.astype(np.int8), np.arange(64), 32, 0, 32, 1, epilogue_of(rng, 16, "codes"))
    same_on_every_set(case, lambda c: computed(c, sparse(c, 127)))


@given(seed=st.integers(0, 2**32), n=st.integers(1, 200), highest=st.sampled_from([255, 127]))
@settings(deadline=None)
def test_codes_of_activations_are_those_of_the_grid(seed: int, n: int, highest: int) -> None:
    rng = np.random.default_rng(seed)
    scale, zero = np.float32(rng.uniform(1e-3, 1)), int(rng.integers(0, highest + 1))
    x = guarded(n, np.float32)
    x[:] = np.where(rng.random(n) < 0.3, (rng.integers(-9, 9, n) + 0.5) * scale, rng.normal(0, 100, n))
    x[rng.random(n) < 0.1] = 3e38
    inverse = np.float32(1.0 / float(scale))
    with np.errstate(over="ignore"):
        expected = np.clip(np.rint(x * inverse) + np.float32(zero), 0, highest).astype(np.uint8)
    for name in _native.instruction_sets():
        _native.use_instruction_set(name)
        codes = guarded(n)
        function, arguments = integers.quantize(x.ctypes.data, n, float(inverse), zero, highest, codes.ctypes.data)
        assert function(*arguments) is False
        np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 40, 70])
def test_quantize_reports_what_is_not_finite(wrong: float, at: int) -> None:
    x, codes = guarded(71, np.float32), guarded(71)
    x[at] = wrong
    for name in _native.instruction_sets():
        _native.use_instruction_set(name)
        function, arguments = integers.quantize(x.ctypes.data, 71, 1.0, 0, 255, codes.ctypes.data)
        assert function(*arguments) is True
