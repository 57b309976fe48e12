"""The products of blocks on a CUDA device, in Triton: rows and columns of a block are each 16, 32 or 64; sums are in float32.

Each program makes one tile of a result in one order, without atomics: equal bits from run to run. A tile has the batch, or the
inputs of several blocks, along its longer side, so that even a block of 16 rows fills the tensor cores of a Hopper GPU. Each block
reads its rows of X again, mostly from the second-level cache. Reads are widest where the batch is a multiple of 16.

``TRITON_INTERPRET=1``, set before this module is imported, runs the same code on CPU tensors.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports] it is optional
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from noctule.core.topology import Places, Topology
from noctule.kernels import reference
from noctule.kernels.epilogue import IDENTITY, Epilogue, Kept

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels take; all tensors of a call have the same, but a bias may have any."""
SIDES = (16, 32, 64)
"""Rows or columns of a block."""
PROGRAMS = 264
"""Programs that a product is cut into if it can be: two for each multiprocessor of an H100."""
LEAST_SPAN = 512
"""Elements of the batch from which it pays that a part of their sum is stored and added later."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue] set at run time


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as whole numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _product(
    row_ptr, columns, slots, values, x, bias, y, batch, ld_x, ld_y,
    OUT: tl.constexpr, IN: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Yᵀ (TILE, OUT) of one row of blocks, WIDE inputs at a time; with ``slots`` the blocks are read transposed."""
    row, b = tl.program_id(0), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside, wide, out = b < batch, tl.arange(0, WIDE), tl.arange(0, OUT)
    total = tl.zeros((TILE, OUT), tl.float32)
    end = tl.load(row_ptr + row + 1)
    for first in range(tl.load(row_ptr + row), end, WIDE // IN):
        k = first + wide // IN
        here = k < end
        source = tl.load(columns + k, mask=here, other=0).to(tl.int64) * IN + wide % IN
        x_tile = tl.load(x + source[None, :] * ld_x + b[:, None], mask=inside[:, None] & here[None, :], other=0.0)
        if slots is None:
            w = k.to(tl.int64)[:, None] * (OUT * IN) + (wide % IN)[:, None] + out[None, :] * IN
        else:
            slot = tl.load(slots + k, mask=here, other=0).to(tl.int64)
            w = slot[:, None] * (OUT * IN) + (wide % IN)[:, None] * OUT + out[None, :]
        w_tile = tl.load(values + w, mask=here[:, None], other=0.0)
        total = _dot(x_tile, w_tile, total, PRECISION)
    row_of_y = row.to(tl.int64) * OUT + out
    if bias is not None:
        total += tl.load(bias + row_of_y).to(tl.float32)[None, :]
    tl.store(y + row_of_y[None, :] * ld_y + b[:, None], total.to(y.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _gradient(
    groups, row_ptr, columns, dy, x, dvalues, size, batch, span, ld_dy, ld_x,
    R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dWᵀ (WIDE, R) of a group of blocks of one row, which share its dY, over one span of the batch."""
    group, part, wide, r = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDE), tl.arange(0, R)
    row = tl.load(groups + 2 * group)
    k = tl.load(groups + 2 * group + 1) + wide // C
    here = k < tl.load(row_ptr + row + 1)
    source = tl.load(columns + k, mask=here, other=0).to(tl.int64) * C + wide % C
    x_rows = x + source[:, None] * ld_x
    dy_rows = dy + (row.to(tl.int64) * R + r)[None, :] * ld_dy
    total = tl.zeros((WIDE, R), tl.float32)
    for at in range(part * span, tl.minimum(part * span + span, batch), STEP):
        b = at + tl.arange(0, STEP)
        inside = b < batch
        x_tile = tl.load(x_rows + b[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        dy_tile = tl.load(dy_rows + b[:, None], mask=inside[:, None], other=0.0)
        total = _dot(x_tile, dy_tile, total, PRECISION)
    to = (part.to(tl.int64) * size + k)[:, None] * (R * C) + (wide % C)[:, None] + r[None, :] * C
    tl.store(dvalues + to, total.to(dvalues.dtype.element_ty), mask=here[:, None])


def takes(dtype: torch.dtype, block: tuple[int, ...]) -> bool:
    """Whether there are kernels for blocks of this shape and type."""
    return dtype in DTYPES and all(side in SIDES for side in block)


def spmm(
    topology: Places, values: Tensor, x_IB: Tensor, bias: Tensor | None, epilogue: Epilogue, keep: bool
) -> tuple[Tensor, Kept]:
    """Y (O, B) = W X + bias through the epilogue, and what its backward needs."""
    rows, columns = topology.shape
    _, r, c = values.shape
    _check("the input", x_IB, columns * c)
    if len(values) != topology.size or (bias is not None and bias.shape != (rows * r,)):
        raise ValueError(
            f"expected {topology.size} values and {rows * r} biases, got {tuple(values.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    index = (topology.row_ptr, topology.columns, None)
    dtype = values.dtype if epilogue == IDENTITY else torch.float32
    y_OB, kept = _multiplied(index, values, x_IB, bias, (rows, r, c), dtype), Kept(epilogue)
    if epilogue != IDENTITY:
        y_OB, kept = reference.finished(y_OB, None, epilogue, keep)
    return y_OB.to(values.dtype), kept


def spmm_t(topology: Places, values: Tensor, dy_OB: Tensor) -> Tensor:
    """dX (I, B) = Wᵀ dY."""
    back, (_, r, c) = topology.transposed, values.shape
    _check("the gradient", dy_OB, back.sources * r)
    if len(values) != topology.size:
        raise ValueError(f"expected {topology.size} values, got {tuple(values.shape)}")
    index, rows = (back.row_ptr, back.columns, back.slots), back.row_ptr.numel() - 1
    return _multiplied(index, values, dy_OB, None, (rows, c, r), values.dtype)


def sddmm(topology: Places, dy_OB: Tensor, x_IB: Tensor) -> Tensor:
    """dW (N, R, C) = the places of dY Xᵀ."""
    return gradients(topology, dy_OB, x_IB, False)[0]


def gradients(topology: Places, dy_OB: Tensor, x_IB: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """dW (N, R, C) and, with ``bias``, that of the bias (O,)."""
    r, c = reference.block_of(topology, dy_OB, x_IB)
    _check("the gradient", dy_OB, topology.shape[0] * r)
    _check("the input", x_IB, topology.shape[1] * c, dy_OB.shape[1])
    dy, x, batch, half = _readable(dy_OB), _readable(x_IB), dy_OB.shape[1], dy_OB.element_size() == 2
    wide, step = (128, 64) if half else (64, 32)
    groups = _groups(topology, wide // c)
    parts = max(1, min(batch // LEAST_SPAN, PROGRAMS // max(1, len(groups))))
    span = triton.cdiv(batch, parts * step) * step
    dvalues = dy.new_empty(parts, topology.size, r, c, dtype=dy.dtype if parts == 1 else torch.float32)
    _run(
        _gradient, (len(groups), parts), groups, topology.row_ptr, topology.columns, dy, x, dvalues, topology.size, batch, span,
        dy.stride(0), x.stride(0), R=r, C=c, WIDE=wide, STEP=step, num_warps=4, num_stages=3,
    )  # fmt: skip
    dvalues = dvalues[0] if parts == 1 else dvalues.sum(0).to(dy.dtype)
    return dvalues, dy.sum(1, dtype=torch.float32).to(dy.dtype) if bias else None


def _multiplied(index, values, x_IB, bias, sizes, dtype) -> Tensor:
    """The blocks of an index times X: ``sizes`` are its rows and the outputs and inputs of a block."""
    (rows, outputs, inputs), (row_ptr, columns, slots) = sizes, index
    x, batch = _readable(x_IB), x_IB.shape[1]
    y_OB = x.new_empty(rows * outputs, batch, dtype=dtype)
    wide, tile = (64, 128) if x.element_size() == 2 else (max(32, inputs), 64)
    while (tile > 16 and tile >= 2 * batch) or (tile > 32 and rows * triton.cdiv(batch, tile) < PROGRAMS):
        tile //= 2
    _run(
        _product, (rows, triton.cdiv(batch, tile)), row_ptr, columns, slots, values.contiguous(), x,
        None if bias is None else bias.contiguous(), y_OB, batch, x.stride(0), y_OB.stride(0), OUT=outputs, IN=inputs, WIDE=wide,
        TILE=tile, num_warps=4 if tile > 32 else 2,
        num_stages=3 if slots is None else 5,  # the read of a value that waits for that of its slot takes two
    )  # fmt: skip
    return y_OB


def _run(kernel: Any, grid: tuple[int, int], *arguments: Any, **options: int) -> None:
    if 0 not in grid:
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, PRECISION=_precision(), **options)


def _precision() -> str:
    """What becomes of float32: as in torch's own products, tf32 only where it is allowed."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _groups(topology: Places, most: int) -> Tensor:
    """(row, first place) of each group of at most so many consecutive places of one row, int32."""
    derived = topology.derived if isinstance(topology, Topology) else {}
    if (key := ("triton", most)) not in derived:
        starts, counts = topology.row_ptr[:-1].to(torch.int64), topology.row_ptr.diff().to(torch.int64)
        each = (counts + most - 1) // most
        rows = torch.arange(len(each), device=each.device).repeat_interleave(each)
        within = torch.arange(len(rows), device=each.device) - (each.cumsum(0) - each)[rows]
        derived[key] = torch.stack([rows, starts[rows] + most * within], 1).to(torch.int32)
    return derived[key]


def _readable(x: Tensor) -> Tensor:
    """``x`` with the batch contiguous within a feature."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def _check(what: str, x: Tensor, features: int, batch: int | None = None) -> None:
    if x.dim() != 2 or x.shape[0] != features or batch not in (None, x.shape[1]):
        raise ValueError(
            f"{what} must be {(features, 'B' if batch is None else batch)} feature-major, got {tuple(x.shape)}"
        )
