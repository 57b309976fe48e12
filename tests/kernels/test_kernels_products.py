"""The compiled products are those of the reference, for every shape, layout, instruction set and number of threads."""

import itertools

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from kernel_cases import (
    BATCHES,
    BLOCKS,
    DTYPES,
    LAYOUTS,
    SETS,
    assert_sums,
    given,
    grids,
    laid_out,
    matrices,
    matrix,
    numbers,
    running,
)

from noctule import kernels
from noctule.core.topology import Topology
from noctule.kernels import Epilogue, native, reference
from noctule.measure.operations import listening

pytestmark = pytest.mark.skipif(not SETS, reason="noctule._native is not built")
PLAIN = Epilogue()


def check_products(
    topology: Topology,
    batch: int,
    layout: str = "plain",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    block: tuple[int, ...] = (),
) -> None:
    r, c = block or (1, 1)
    out_features, in_features, n = topology.shape[0] * r, topology.shape[1] * c, topology.size
    values, bias = numbers(n, *block, seed=seed + 1, dtype=dtype), numbers(out_features, seed=seed + 2)
    x, dy = given(in_features, batch, layout, seed + 3, dtype), given(out_features, batch, layout, seed + 4, dtype)

    def exactly(what, *tensors):
        both = [what(topology, *(part(t.double()) for t in tensors)) for part in (torch.Tensor.clone, torch.abs)]
        return *both, dtype

    y, _ = native.spmm(topology, values, x, bias, PLAIN, False)
    assert_sums(y, *exactly(lambda t, v, x, b: reference.spmm(t, v, x, b, PLAIN, False)[0], values, x, bias))
    y, _ = native.spmm(topology, values, x, None, PLAIN, False)
    assert_sums(y, *exactly(lambda t, v, x: reference.spmm(t, v, x, None, PLAIN, False)[0], values, x))
    assert_sums(native.spmm_t(topology, values, dy), *exactly(reference.spmm_t, values, dy))
    assert_sums(native.sddmm(topology, dy, x), *exactly(reference.sddmm, dy, x))
    dvalues, dbias = native.gradients(topology, dy, x, True)
    assert torch.equal(dvalues, native.sddmm(topology, dy, x))
    assert_sums(dbias, *exactly(lambda t, d, x: reference.gradients(t, d, x, True)[1], dy, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
@hypothesis.given(matrices(), st.sampled_from(BATCHES), st.sampled_from(LAYOUTS), st.integers(0, 99))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_native_is_reference(instruction_set, dtype, topology, batch, layout, seed):
    with running(instruction_set):
        check_products(topology, batch, layout, seed, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
@hypothesis.given(
    grids(), st.sampled_from(BLOCKS), st.sampled_from(BATCHES), st.sampled_from(LAYOUTS), st.integers(0, 99)
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_native_is_reference_over_blocks(instruction_set, dtype, topology, block, batch, layout, seed):
    with running(instruction_set):
        check_products(topology, batch, layout, seed, dtype, block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("batch", [*BATCHES, 31, 32, 33, 65])
def test_every_batch_with_every_layout(instruction_set, batch, dtype):
    with running(instruction_set):
        for kind, layout in itertools.product(("some", "all"), LAYOUTS):
            check_products(matrix(19, 21, kind), batch, layout, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
def test_sums_over_several_tiles_of_the_batch_in_full_rows(instruction_set, dtype):
    # rows of 70 weights: groups of sixteen and some left over; batches of one tile of 128 columns and of more
    with running(instruction_set):
        for batch in (127, 128, 129, 255, 257, 385, 902):
            check_products(matrix(40, 70, "all"), batch, dtype=dtype)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(
    "shape", [(0, 0), (0, 5), (5, 0), (1, 1), (1, 300), (300, 1), (2, 40), (40, 2)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_thin_and_empty_matrices(instruction_set, shape):
    with running(instruction_set):
        for kind in ("none", "some", "all", "gaps"):
            for batch in (0, 1, 17):
                for dtype in DTYPES:
                    check_products(matrix(*shape, kind), batch, dtype=dtype)


@pytest.mark.parametrize("instruction_set", SETS)
def test_every_width_of_the_indices(instruction_set):
    small, wide, tall = matrix(30, 40, "some"), Topology.random((9, 65_537), 500), Topology.random((65_537, 9), 500)
    assert [small.columns.dtype, wide.columns.dtype] == [torch.uint16, torch.int32]
    assert [small.transposed.columns.dtype, tall.transposed.columns.dtype] == [torch.uint16, torch.int32]
    assert Topology.random((1, 65_536), 5).columns.dtype == torch.uint16
    with running(instruction_set):
        for topology in (small, wide, tall):
            check_products(topology, 20)
            check_products(topology, 20, dtype=torch.bfloat16)
            long = Topology(topology.shape, topology.row_ptr.to(torch.int64), topology.columns)
            assert long.transposed.slots.dtype == torch.int64
            check_products(long, 20)
            check_products(long, 20, dtype=torch.bfloat16)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-38, 1e19, 2e37])
def test_bfloat16_is_rounded_as_torch_rounds_it(instruction_set, size):
    # two terms to a sum: products of bfloat16 are exact in float32, so only the result is rounded, and once
    topology = Topology.from_places((500, 600), torch.arange(500).repeat_interleave(2), torch.arange(1000) % 600)
    values, x = numbers(topology.size, dtype=torch.bfloat16) * size, numbers(600, 67, seed=1, dtype=torch.bfloat16)
    values[:2], x[:2] = torch.tensor([torch.finfo(torch.bfloat16).max, 8e35]), 1.0  # a sum that rounds to infinity
    dy, x_two = numbers(500, 2, seed=2, dtype=torch.bfloat16) * size, x[:, :2].contiguous()
    with running(instruction_set):
        y, _ = native.spmm(topology, values, x, None, PLAIN, False)
        dvalues = native.sddmm(topology, dy, x_two)
    expected, _ = reference.spmm(topology, values, x, None, PLAIN, False)
    assert torch.isinf(expected[0]).all()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dvalues, reference.sddmm(topology, dy, x_two), rtol=0, atol=0, equal_nan=True)


def test_factors_of_two_dtypes_are_taken_as_the_wider():
    topology = matrix(20, 30, "some")
    values, x, dy = numbers(topology.size), numbers(30, 17, dtype=torch.bfloat16), numbers(20, 17, seed=1)
    assert torch.equal(kernels.spmm(topology, values, x)[0], kernels.spmm(topology, values, x.float())[0])
    assert torch.equal(
        kernels.spmm_t(topology, values.bfloat16(), dy), kernels.spmm_t(topology, values.bfloat16().float(), dy)
    )
    assert torch.equal(kernels.sddmm(topology, dy, x), kernels.sddmm(topology, dy, x.float()))


@pytest.mark.parametrize("instruction_set", SETS)
def test_the_last_of_65536_columns(instruction_set):
    topology = Topology.from_places((2, 65_536), torch.tensor([0, 1, 1]), torch.tensor([65_535, 0, 65_535]))
    with running(instruction_set):
        check_products(topology, 3)


@pytest.mark.parametrize("instruction_set", SETS)
def test_more_places_than_two_to_the_31(instruction_set):
    topology = Topology.random((100_000, 100_000), 1000, generator=torch.Generator().manual_seed(0))
    assert topology.places > 2**31
    with running(instruction_set):
        check_products(topology, 2)


@pytest.mark.parametrize("instruction_set", SETS)
def test_a_huge_batch(instruction_set):
    with running(instruction_set, 2):
        for dtype in DTYPES:
            check_products(matrix(3, 4, "some"), 100_003, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("batch", [1, 3, 128, 129, 902])
def test_bit_equal_from_run_to_run_and_for_any_number_of_threads(instruction_set, batch, dtype):
    topology = matrix(70, 90, "gaps")
    values, bias = numbers(topology.size, dtype=dtype), numbers(70, seed=1)
    x, dy = numbers(90, batch, seed=2, dtype=dtype), numbers(70, batch, seed=3, dtype=dtype)
    epilogue = Epilogue(0.1, 0.5, 7)

    def everything():
        y, kept = native.spmm(topology, values, x, bias, epilogue, True)
        dz, dbias = native.epilogue_backward(dy, kept, True)
        return y, dz, dbias, native.spmm_t(topology, values, dz), native.sddmm(topology, dz, x), native.transpose(x)

    with running(instruction_set, 1):
        first, again = everything(), everything()
    for threads in (2, 5):
        with running(instruction_set, threads):
            shared_out = everything()
        for a, b in zip(first, shared_out):
            assert torch.equal(a, b)
    for a, b in zip(first, again):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5), (1, 300), (2, 40), (40, 2)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_more_threads_than_rows(shape):
    with running(SETS[0], 7):
        for kind in ("none", "all", "gaps"):
            check_products(matrix(*shape, kind), 17)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_goes_where_it_has_a_place_and_nowhere_else(instruction_set, bad, dtype):
    topology = matrix(20, 30, "gaps", seed=1)
    values, x, dy = (t.to(dtype) for t in (numbers(topology.size), numbers(30, 17), numbers(20, 17, seed=1)))
    x[7, 16], dy[4, 3] = bad, bad
    with running(instruction_set):
        y, _ = native.spmm(topology, values, x, None, PLAIN, False)
        results = (
            (y, reference.spmm(topology, values, x, None, PLAIN, False)[0]),
            (native.spmm_t(topology, values, dy), reference.spmm_t(topology, values, dy)),
            (native.sddmm(topology, dy, x), reference.sddmm(topology, dy, x)),
        )
    for actual, expected in results:
        torch.testing.assert_close(actual, expected, equal_nan=True)
        assert not torch.isfinite(expected).all()
    held = topology.rows()[topology.columns.to(torch.int64) == 7].unique()
    assert (~torch.isfinite(y)).nonzero().tolist() == [[int(row), 16] for row in held]


def test_the_defaults_of_torch_do_not_matter():
    topology = matrix(20, 30, "some")
    values, bias, x, dy = numbers(topology.size), numbers(20), numbers(30, 17), numbers(20, 17)

    def everything():
        y, kept = kernels.spmm(topology, values, x, bias, Epilogue(0.1, 0.5, 3), keep=True)
        dz, dbias = kernels.epilogue_backward(dy, kept, bias=True)
        return y, dz, dbias, kernels.spmm_t(topology, values, dy), kernels.sddmm(topology, dy, x), native.transpose(x)

    expected = everything()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            actual = everything()
        finally:
            torch.set_default_dtype(torch.float32)
        for a, b in zip(actual, expected):
            assert torch.equal(a, b)
    with torch.device("meta"):
        actual = everything()
    for a, b in zip(actual, expected):
        assert torch.equal(a, b)


def test_values_and_biases_of_any_stride_and_a_bias_of_another_dtype():
    topology, x = matrix(20, 30, "some"), numbers(30, 17)
    values, bias = numbers(2 * topology.size)[::2], numbers(40)[::2]
    expected, _ = kernels.spmm(topology, values.contiguous(), x, bias.contiguous())
    assert torch.equal(kernels.spmm(topology, values, x, bias)[0], expected)
    assert torch.equal(kernels.spmm(topology, values, x, bias.double())[0], expected)
    one = torch.tensor([0.5]).expand(20)
    assert torch.equal(kernels.spmm(topology, values, x, one)[0], kernels.spmm(topology, values, x, one.clone())[0])


@pytest.mark.parametrize(
    ("values", "x", "bias"),
    [(9, (30, 4), 20), (10, (29, 4), 20), (10, (30, 4), 19), (10, (30,), 20), (10, (31, 4), 20)],
)
def test_shapes_that_do_not_fit_are_refused(values, x, bias):
    topology = Topology.random((20, 30), 10)
    with pytest.raises((ValueError, IndexError)):
        kernels.spmm(topology, torch.zeros(values), torch.zeros(x), torch.zeros(bias))


def test_gradients_that_do_not_fit_are_refused():
    topology = Topology.random((20, 30), 10)
    with pytest.raises(ValueError, match="feature-major"):
        kernels.sddmm(topology, torch.zeros(20, 4), torch.zeros(30, 5))
    with pytest.raises(ValueError, match="feature-major"):
        kernels.sddmm(topology, torch.zeros(30, 5), torch.zeros(30, 5))
    for rows in (29, 31):  # fewer would be read past their end
        with pytest.raises(ValueError, match="the input must be"):
            kernels.sddmm(topology, torch.zeros(20, 4), torch.zeros(rows, 4))
    with pytest.raises(ValueError, match="feature-major"):
        kernels.spmm_t(topology, torch.zeros(10), torch.zeros(30, 5))


def test_multiply_adds_are_counted():
    topology = Topology.random((20, 30), 50)
    with listening() as counter:
        kernels.spmm(topology, torch.zeros(50), torch.zeros(30, 4))
        kernels.spmm_t(topology, torch.zeros(50), torch.zeros(20, 4))
        kernels.sddmm(topology, torch.zeros(20, 4), torch.zeros(30, 4))
    assert counter.multiply_adds == 3 * 50 * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
@hypothesis.given(st.sampled_from([*BATCHES, 31, 48]), st.sampled_from([0, 1, 5, 8, 16, 33, 64]), st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_transpose(instruction_set, dtype, batch, features, padded):
    x_BI = laid_out(numbers(batch, features, dtype=dtype), "padded" if padded else "plain")
    with running(instruction_set):
        x_IB = native.transpose(x_BI)
    assert torch.equal(x_IB, x_BI.t())
    assert batch < 2 or features < 1 or x_IB.stride(1) == 1


def test_feature_major_is_a_view_where_it_can_be():
    x_IB = numbers(20, 17)
    assert kernels.feature_major(x_IB.t()).data_ptr() == x_IB.data_ptr()
    padded = numbers(20, 32)[:, :17]
    assert kernels.feature_major(padded.t()).data_ptr() == padded.data_ptr()
    one = numbers(1, 20)
    assert kernels.feature_major(one).data_ptr() == one.data_ptr()
    for layout in LAYOUTS:
        x_BI = given(17, 20, layout, 0)
        x_IB = kernels.feature_major(x_BI)
        assert torch.equal(x_IB, x_BI.t())
        assert x_IB.stride(1) == 1
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        x_BI = torch.arange(12).view(3, 4).to(dtype)
        assert torch.equal(kernels.feature_major(x_BI), x_BI.t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("batch", [1, 5, 8, 15, 16, 17, 31, 32, 33, 100, 385])
def test_nothing_is_written_beside_the_results(instruction_set, batch, dtype):
    topology, guard = matrix(13, 11, "some"), 77.0
    module, rows, stored, size = native._native, 13, topology.size, dtype.itemsize
    x, dy, values = (numbers(*shape, dtype=dtype) for shape in ((11, batch), (13, batch), (stored,)))
    places = module.Places(rows, 4, 2, topology.row_ptr.data_ptr(), topology.columns.data_ptr(), 0)
    y = torch.full((rows + 1, batch + 9), guard, dtype=dtype)
    bits_ld = (batch + 7) // 8 + 1
    positive, kept = torch.full((2, rows + 1, bits_ld), 0xAA, dtype=torch.uint8)
    with running(instruction_set):
        module.spmm(
            places, size, 1, 1, values.data_ptr(), x.data_ptr(), batch, 0,
            y.data_ptr(), batch + 9, 0, batch, 1, 1, 0, 0.5, 1 << 31, 2.0, 5, positive.data_ptr(), kept.data_ptr(), bits_ld,
        )  # fmt: skip
        assert (y[:rows, batch:] == guard).all()
        assert (y[rows] == guard).all()
        assert (y[:rows, :batch] != guard).all()
        for bits in (positive, kept):
            assert (bits[:rows, -1] == 0xAA).all()
            assert (bits[rows] == 0xAA).all()
        dz, dbias, dvalues = y.fill_(guard), y.new_full((rows + 1,), guard), y.new_full((stored + 9,), guard)
        module.epilogue_backward(
            size, dy.data_ptr(), batch, dz.data_ptr(), batch + 9, dbias.data_ptr(), rows, batch, 1, 0.5, 2.0,
            positive.data_ptr(), kept.data_ptr(), bits_ld,
        )  # fmt: skip
        assert (dz[:rows, batch:] == guard).all()
        assert (dz[rows] == guard).all()
        assert dbias[rows] == guard
        dbias.fill_(guard)
        module.sddmm(
            places, size, 1, 1, 11, dy.data_ptr(), batch, 0, x.data_ptr(), batch,
            0, dvalues.data_ptr(), dbias.data_ptr(), batch, 1, 1,
        )  # fmt: skip
        assert dbias[rows] == guard
        assert (dvalues[stored:] == guard).all()
        module.transpose(size, dy.data_ptr(), batch, y.fill_(guard).data_ptr(), rows + 1, rows, batch, 1)
        flat = y.flatten()[: batch * (rows + 1)].view(batch, rows + 1)
        assert torch.equal(flat[:, :rows], dy.t())
        assert (flat[:, rows] == guard).all()
        assert (y.flatten()[batch * (rows + 1) :] == guard).all()
        module.copy_rows(size, dy.data_ptr(), batch, y.fill_(guard).data_ptr(), batch + 9, rows, batch, 1)
        assert torch.equal(y[:rows, :batch], dy)
        assert (y[:rows, batch:] == guard).all()
        assert (y[rows] == guard).all()


def test_an_unknown_instruction_set_is_refused():
    before = native.instruction_set()
    with pytest.raises(ValueError, match="instruction set"):
        native._native.use_instruction_set("abacus")
    assert native.instruction_set() == before
    assert SETS[-1] == "portable"
