"""A step of a linear layer in one call is the single products one after the other, bit for bit."""

import itertools

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from kernel_cases import BATCHES, BLOCKS, DTYPES, LAYOUTS, SETS, assert_sums, grids, laid_out, matrix, numbers, running

from noctule import kernels
from noctule.core.topology import Topology
from noctule.kernels import Epilogue, native, reference, steps

pytestmark = pytest.mark.skipif(not SETS, reason="noctule._native is not built")
EPILOGUES = [Epilogue(), Epilogue(0.1), Epilogue(0.0, 0.5, 7), Epilogue(1.0, 0.3, 8)]
PARTS = (torch.Tensor.clone, torch.abs)
NEEDS = list(itertools.product([True, False], repeat=3))


def by_batch(x_FB: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers as (B, F): a view of feature-major ones, or rows of the batch."""
    return laid_out(x_FB, layout[4:]).t() if layout.startswith("its ") else laid_out(x_FB.t().contiguous(), layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
@hypothesis.given(
    grids(),
    st.sampled_from([(), *BLOCKS]),
    st.sampled_from(BATCHES[1:]),
    st.sampled_from([*LAYOUTS[:5], *(f"its {layout}" for layout in LAYOUTS[:5])]),
    st.sampled_from(EPILOGUES),
    st.sampled_from(NEEDS),
    st.sampled_from([1, 2]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_step_is_its_products(instruction_set, dtype, topology, block, batch, layout, epilogue, needs, threads):
    r, c = block or (1, 1)
    outputs, features = topology.shape[0] * r, topology.shape[1] * c
    values, bias = numbers(topology.size, *block, dtype=dtype), numbers(outputs, seed=1)
    x_BI = by_batch(numbers(features, batch, seed=2, dtype=dtype), layout)
    dy_BO = by_batch(numbers(outputs, batch, seed=3, dtype=dtype), layout)
    with running(instruction_set, threads):
        y_BO, x_IB, kept = steps.forward(topology, values, x_BI, bias, epilogue, True)
        given = x_BI if x_IB is None else x_IB
        dz, dx_BI, dvalues, dbias = steps.backward(topology, values, given, dy_BO, kept, needs, x_IB is not None)
        x, dy = kernels.feature_major(x_BI), kernels.feature_major(dy_BO)
        y, kept_alone = native.spmm(topology, values, x, bias, epilogue, True)
        d, b = native.epilogue_backward(dy, kept_alone, True)
        alone = native.gradients(topology, d, x, True)
        back = native.spmm_t(topology, values, d)
    assert torch.equal(y_BO, y.t())
    assert (x_IB is None) == (x_BI.stride(0) == 1 or batch == 1)
    assert x_IB is None or torch.equal(x_IB, x_BI.t())
    assert torch.equal(dy.t() if dz is None else dz.t(), d.t())
    assert [t is not None for t in (dx_BI, dvalues, dbias)] == list(needs)
    assert dx_BI is None or torch.equal(dx_BI, back.t())
    assert dx_BI is None or batch == 1 or (dx_BI.stride(0) == 1) == (x_IB is None or features == 1)
    assert dvalues is None or torch.equal(dvalues, alone[0])
    assert dbias is None or torch.equal(dbias, alone[1] if needs[1] else b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
def test_values_that_leave_the_cache_are_put_in_order_first(instruction_set, dtype):
    topology = matrix(760, 720, "all")
    assert topology.size * dtype.itemsize > 1 << 20
    values, dy = numbers(topology.size, dtype=dtype), numbers(760, 3, dtype=dtype)
    with running(instruction_set, 2):
        dx = native.spmm_t(topology, values, dy)
    exact = [reference.spmm_t(topology, part(values.double()), part(dy.double())) for part in PARTS]
    assert_sums(dx, *exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("threads", [1, 3])
def test_long_rows_are_gathered_tile_by_tile(instruction_set, dtype, threads):
    topology = matrix(40, 30, "all")
    dy, x = numbers(40, 1030, dtype=dtype), numbers(30, 1030, seed=1, dtype=dtype)
    with running(instruction_set, threads):
        dvalues = native.sddmm(topology, dy, x)
    exact = [reference.sddmm(topology, part(dy.double()), part(x.double())) for part in PARTS]
    assert_sums(dvalues, *exact, dtype)


@pytest.mark.parametrize(
    ("values", "x", "bias"),
    [((9,), (4, 30), 20), ((10,), (4, 29), 20), ((10,), (4, 30), 19), ((10, 4, 4), (4, 30), 20)],
)
def test_a_step_that_does_not_fit_is_refused(values, x, bias):
    with pytest.raises(ValueError, match="does not fit"):
        kernels.forward(
            Topology.random((20, 30), 10),
            torch.zeros(values),
            torch.zeros(x),
            torch.zeros(bias),
            Epilogue(),
            keep=False,
        )
