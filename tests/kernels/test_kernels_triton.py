"""The products in Triton are those of the reference: on a GPU, and under its interpreter where there is none."""

import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import laid_out, matrix, numbers
from torch import Tensor
from torch._subclasses import FakeTensorMode

from noctule import kernels
from noctule.core.topology import Topology
from noctule.kernels import IDENTITY, Epilogue, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or Triton and TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
from noctule.kernels import triton as ours  # noqa: E402 it imports Triton

DEVICE = "cpu" if INTERPRETED else "cuda"
EPSILON = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of the largest number: sums in another order, or one place of the half precisions, which the interpreter cuts off."""
BLOCKS = [(16, 16), (32, 32), (64, 64), (16, 64), (32, 16)]
BATCHES = [0, 1, 17, 64, 130]
KINDS = ["none", "some", "all", "gaps"]


def case(block, kind, batch, dtype, *, columns=5) -> tuple[Topology, Tensor, Tensor, Tensor, Tensor]:
    """A topology, values, x, dy and a bias."""
    (r, c), topology = block, matrix(4, columns, kind, seed=batch).to(DEVICE)
    values, bias = numbers(topology.size, r, c), numbers(4 * r, seed=1)
    x, dy = numbers(columns * c, batch, seed=2), numbers(4 * r, batch, seed=3)
    return topology, *(t.to(DEVICE, dtype) for t in (values, x, dy, bias))


def check(actual: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    assert actual is not None
    assert expected is not None
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, dtype, expected.device)
    error = (actual.double() - expected.double()).abs()
    assert bool((error <= EPSILON[dtype] * max(1.0, float(expected.abs().max() if expected.numel() else 0))).all())


def all_agree(topology, values, x, dy, bias, epilogue=IDENTITY) -> None:
    y, kept = ours.spmm(topology, values, x, bias, epilogue, True)
    expected, expected_kept = reference.spmm(topology, values, x, bias, epilogue, True)
    check(y, expected, values.dtype)
    for bits, expected_bits in ((kept.positive, expected_kept.positive), (kept.kept, expected_kept.kept)):
        assert (bits is None) == (expected_bits is None)
        assert bits is None or bits.shape == expected_bits.shape
    check(ours.spmm_t(topology, values, dy), reference.spmm_t(topology, values, dy), values.dtype)
    for actual, expected in zip(ours.gradients(topology, dy, x, True), reference.gradients(topology, dy, x, True)):
        check(actual, expected, values.dtype)
    assert torch.equal(ours.sddmm(topology, dy, x), ours.gradients(topology, dy, x, False)[0])


@pytest.mark.parametrize("dtype", ours.DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_products_are_those_of_the_reference(block, dtype):
    for kind, batch in zip(KINDS, [17, 64, 1, 130]):
        all_agree(*case(block, kind, batch, dtype))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("programs", [1, 10_000])
def test_tiles_and_parts_do_not_matter(monkeypatch, programs, batch):
    monkeypatch.setattr(ours, "PROGRAMS", programs)  # large tiles of one part, small ones of several
    monkeypatch.setattr(ours, "LEAST_SPAN", 40)
    for dtype in (torch.float32, torch.bfloat16):
        all_agree(*case((32, 16), "gaps", batch, dtype))


@pytest.mark.parametrize("layout", ["padded", "misaligned", "strided", "transposed"])
def test_rows_may_lie_anywhere(layout):
    topology, values, x, dy, bias = case((16, 32), "some", 33, torch.float32)
    x, dy = (laid_out(t.cpu(), layout).to(DEVICE) if layout != "padded" else padded(t) for t in (x, dy))
    all_agree(topology, values, x, dy, bias)


def padded(x: Tensor) -> Tensor:
    """The same numbers, with what must not be read between the rows."""
    wide = x.new_full((x.shape[0], x.shape[1] + 5), torch.nan)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@pytest.mark.parametrize("columns", [3, 2**16 + 2])
def test_columns_of_two_bytes_and_of_four(columns):
    shape, places = (2, columns), torch.tensor([columns - 1, columns, 2 * columns - 1])
    topology = Topology.from_keys(shape, places).to(DEVICE)
    assert topology.columns.dtype is (torch.uint16 if columns < 2**16 else torch.int32)
    values = numbers(3, 16, 16).to(DEVICE)
    x, dy = numbers(columns * 16, 2).to(DEVICE), numbers(32, 2).to(DEVICE)
    check(
        ours.spmm(topology, values, x, None, IDENTITY, False)[0],
        reference.spmm(topology, values, x, None, IDENTITY, False)[0],
        x.dtype,
    )
    check(ours.sddmm(topology, dy, x), reference.sddmm(topology, dy, x), x.dtype)
    across = Topology.from_keys((columns, 2), torch.tensor([0, 1, 2 * columns - 1])).to(DEVICE)
    assert across.transposed.columns.dtype is topology.columns.dtype
    check(ours.spmm_t(across, values, x), reference.spmm_t(across, values, x), x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_epilogue_is_that_of_the_reference(dtype):
    epilogue = Epilogue(slope=0.25, dropout=0.5, seed=7)
    topology, values, x, dy, bias = case((32, 32), "some", 70, dtype)
    all_agree(topology, values, x, dy, bias, epilogue)
    _, kept = ours.spmm(topology, values, x, bias, epilogue, True)
    _, expected = reference.spmm(topology, values, x, bias, epilogue, True)
    assert kept.kept is not None
    assert torch.equal(kept.kept, expected.kept)
    assert ours.spmm(topology, values, x, bias, epilogue, False)[1].kept is None


def test_what_no_place_reads_does_not_matter():
    rows, columns = torch.tensor([1, 3, 3, 3]), torch.tensor([2, 2, 3, 4])
    topology = Topology.from_places((4, 5), rows, columns).to(DEVICE)
    values, x, dy = (numbers(*shape).to(DEVICE) for shape in ((4, 16, 16), (80, 17), (64, 17)))
    x[:32], dy[:16], dy[32:48] = torch.nan, torch.nan, torch.nan
    y, dx = ours.spmm(topology, values, x, None, IDENTITY, False)[0], ours.spmm_t(topology, values, dy)
    assert all(torch.isfinite(t).all() for t in (y, dx, ours.sddmm(topology, dy, x)))
    read = torch.tensor([0, 1, 0, 1, 1], device=DEVICE).bool().repeat_interleave(16)
    assert torch.equal(y.abs().sum(1) > 0, read[:64])
    assert torch.equal(dx.abs().sum(1) > 0, torch.arange(80, device=DEVICE) >= 32)


def test_tf32_where_torch_allows_it():
    topology, values, x, *_ = case((32, 32), "all", 64, torch.float32)
    exact = reference.spmm(topology, values.double(), x.double(), None, IDENTITY, False)[0]
    before, errors = torch.backends.cuda.matmul.fp32_precision, {}
    assert ours._precision() == "ieee"
    try:
        for allowed in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = allowed
            assert ours._precision() == allowed
            y = ours.spmm(topology, values, x, None, IDENTITY, False)[0]
            errors[allowed] = float((y - exact).abs().max() / exact.abs().max())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 1e-5
    assert errors["tf32"] < 1e-2
    assert INTERPRETED or errors["tf32"] > 1e-5


@pytest.mark.skipif(INTERPRETED, reason="programs run one after another")
def test_equal_bits_from_run_to_run():
    topology, values, x, dy, bias = case((32, 32), "all", 4096, torch.bfloat16, columns=70)
    for product in (
        lambda: ours.spmm(topology, values, x, bias, IDENTITY, False)[0],
        lambda: ours.spmm_t(topology, values, dy),
        lambda: ours.sddmm(topology, dy, x),
    ):
        assert torch.equal(product(), product())


def test_the_index_of_groups_is_kept_and_counted():
    topology, _, x, dy, _ = case((16, 16), "some", 8, torch.float32)
    before = topology.nbytes
    ours.sddmm(topology, dy, x)
    (key,) = topology.derived
    groups = topology.derived[key]
    assert topology.nbytes == before + groups.nbytes
    ours.sddmm(topology, dy, x)
    assert topology.derived[key] is groups
    rows = topology.rows()
    for row, first in groups.tolist():
        assert rows[first] == row


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t, v, x, b: (t, v, x[:-1], b), "the input must be"),
        (lambda t, v, x, b: (t, v[1:], x, b), "values"),
        (lambda t, v, x, b: (t, v, x, b[1:]), "biases"),
    ],
)
def test_wrong_shapes_are_refused(change, text):
    topology, values, x, dy, bias = case((16, 16), "some", 8, torch.float32)
    with pytest.raises(ValueError, match=text):
        ours.spmm(*change(topology, values, x, bias), IDENTITY, False)
    with pytest.raises(ValueError, match="the gradient must be"):
        ours.spmm_t(topology, values, dy[:-1])
    with pytest.raises(ValueError, match="the input must be"):
        ours.gradients(topology, dy, x[:, 1:], False)


def test_blocks_on_a_cuda_device_come_here():
    with FakeTensorMode():

        def code(block, dtype=torch.float32, device="cuda"):
            values = torch.empty(3, *block, dtype=dtype, device=device)
            return kernels._code_for(values, block=block)

        for block in BLOCKS:
            for dtype in ours.DTYPES:
                assert code(block, dtype) is ours
        assert code((16, 16), torch.float64) is reference
        assert code((8, 8)) is reference
        assert code((16, 48)) is reference
        assert code((16, 16), device="cpu") is not ours


COMPILED = """
import re
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from noctule.kernels import triton as ours

def compiled(kernel, arguments, **constants):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else t for n, t in zip(names, arguments.split() + ["constexpr"] * 9)}
    at = {(names.index(n),): value for n, value in constants.items()}
    even = {(names.index(n),): [["tt.divisibility", 16]] for n, t in signature.items() if t != "constexpr"}
    made = triton.compile(ASTSource(kernel, signature, at, even), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, len(re.findall("wgmma.mma_async", made.asm["ptx"])), len(re.findall("cp.async.cg", made.asm["ptx"])))

product = dict(OUT=32, IN=32, WIDE=64, TILE=128, PRECISION="ieee")
x = "*bf16"
compiled(ours._product, f"*i32 *u16 - {x} {x} *fp32 {x} i32 i32 i32", slots=None, **product)
compiled(ours._product, f"*i32 *u16 *i32 {x} {x} - {x} i32 i32 i32", bias=None, **product)
compiled(ours._gradient, f"*i32 *i32 *u16 {x} {x} {x} i32 i32 i32 i32 i32", R=32, C=32, WIDE=128, STEP=64, PRECISION="ieee")
"""


def test_they_compile_for_a_hopper_gpu_to_its_own_instructions(tmp_path):
    """Without a GPU: warp-group multiplies, and copies of 16 bytes that run ahead."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == ["_product", "_product", "_gradient"]
    assert all(int(multiplies) > 0 and int(copies) > 0 for _, multiplies, copies in lines)
