"""The compiled products, for float32 and bfloat16 tensors on the CPU; both add up in float32.

Layouts that a row of the batch is read from at full speed: rows start on a cache line, and not a whole page apart, where all
of them would meet in the same few sets of the cache.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from noctule.core.topology import Places, Transposed
from noctule.kernels import reference
from noctule.kernels.epilogue import IDENTITY, Epilogue, Kept
from noctule.kernels.frame import LINE, PAGE, Frame, row_length

_native: Any
try:
    from noctule import _native
except ImportError:
    _native = None

DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels are compiled for; all tensors of a call have the same, but a bias may have any."""
BLOCKS = (4, 8, 16, 32)
"""Rows and columns that a block has, where a place is one."""
PARALLEL_FROM = 1 << 19
"""Multiply-adds, some 30 us of one thread, under which it is not worth waking the others. From there on all of them share the
work: a team of another size than the last would have libgomp end threads and start new ones."""
MOVED = 2
"""Multiply-adds that take as long as moving an element."""
REPACK_FROM = 8
"""Uses of a row from which it pays to copy misplaced rows to cache lines first."""


_warned = False


def available() -> bool:
    """Whether the compiled module is here; warns once where it is not."""
    global _warned
    if _native is None and not _warned:
        _warned = True
        warnings.warn(
            "noctule._native is missing, the sparse products run in plain torch (slow): "
            "install Noctule with pip where a C++ compiler is at hand",
            RuntimeWarning,
            stacklevel=2,
        )
    return _native is not None


def instruction_set() -> str:
    """The instruction set in use, or "none"."""
    return _native.instruction_set() if _native is not None else "none"


def spmm(
    topology: Places, values: Tensor, x_IB: Tensor, bias: Tensor | None, epilogue: Epilogue, keep: bool
) -> tuple[Tensor, Kept]:
    """Y (O, B) = W X + bias through the epilogue, and what its backward needs."""
    positive = kept = None
    bits = topology.shape[0] * block_of(values)[0], *x_IB.shape[1:-1], (x_IB.shape[-1] + 7) // 8
    if keep and epilogue.slope != 1.0:
        positive = torch.empty(bits, dtype=torch.uint8, device="cpu")
    if keep and epilogue.drop_below:
        kept = torch.empty(bits, dtype=torch.uint8, device="cpu")
    y_OB = _spmm(_places(topology), topology, topology.shape, values, x_IB, bias, epilogue, positive, kept)
    return y_OB, Kept(epilogue, positive, kept)


def spmm_t(topology: Places, values: Tensor, dy_OB: Tensor) -> Tensor:
    """dX (I, B) = Wᵀ dY."""
    back = topology.transposed
    grid = back.row_ptr.numel() - 1, back.sources
    return _spmm(_places(back), topology, grid, values, dy_OB, None, IDENTITY, None, None, transposed=True)


def sddmm(topology: Places, dy_OB: Tensor, x_IB: Tensor) -> Tensor:
    """dW (N,) = the places of dY Xᵀ."""
    return gradients(topology, dy_OB, x_IB, False)[0]


def gradients(topology: Places, dy_OB: Tensor, x_IB: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """dW (N,) and, with ``bias``, that of the bias (O,)."""
    (r, c), columns_of_line = reference.block_of(topology, dy_OB, x_IB), x_IB.shape[1:]
    _check("the gradient", dy_OB, topology.shape[0] * r, columns_of_line)
    _check("the input", x_IB, topology.shape[1] * c, columns_of_line)
    dvalues = dy_OB.new_empty(topology.size if r * c == 1 else (topology.size, r, c))
    dbias = dy_OB.new_empty(topology.shape[0] * r) if bias else None
    weights = dvalues.numel()
    dy, x = _packed(dy_OB, weights), _packed(x_IB, weights)
    (length, lines), (dy_step, x_step) = _lines(dy, x)
    _native.sddmm(
        _places(topology), dy.element_size(), r, c, x.shape[0], dy.data_ptr(), dy.stride(0), dy_step, x.data_ptr(), x.stride(0),
        x_step, dvalues.data_ptr(), _address(dbias), length, lines, _threads(weights * length * lines),
    )  # fmt: skip
    return dvalues, dbias


def epilogue_backward(dy_OB: Tensor, kept: Kept, bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient before the epilogue (O, B) and, with ``bias``, that of the bias (O,)."""
    if dy_OB.dim() == 3:  # a line at a time
        dz, dbias = epilogue_backward(dy_OB.flatten(0, 1), _flat(kept), False)
        dz = dz.view(dy_OB.shape)
        return dz, dz.sum((1, 2)) if bias else dbias
    rows, batch = dy_OB.shape
    dy = _readable(dy_OB)
    if not kept.changed and not bias:
        return dy, None
    dz = _rows(rows, batch, dy.dtype) if kept.changed else dy
    dbias = dy.new_empty(rows) if bias else None
    _native.epilogue_backward(
        dy.element_size(), dy.data_ptr(), dy.stride(0), _address(dz) if kept.changed else 0, dz.stride(0), _address(dbias), rows,
        batch, _threads(MOVED * rows * batch), kept.epilogue.slope, kept.epilogue.scale, _address(kept.positive),
        _address(kept.kept), (batch + 7) // 8,
    )  # fmt: skip
    return dz, dbias


def transpose(x_BI: Tensor) -> Tensor:
    """(I, B), the batch contiguous."""
    batch, features = x_BI.shape
    x = x_BI if x_BI.stride(1) == 1 or features == 1 else x_BI.contiguous()
    x_IB = _rows(features, batch, x.dtype)
    _native.transpose(
        x.element_size(), x.data_ptr(), x.stride(0), x_IB.data_ptr(), x_IB.stride(0), batch, features,
        _threads(MOVED * batch * features),
    )  # fmt: skip
    return x_IB


def place(x_BCHW: Tensor, frame: Frame) -> Tensor:
    """An image with zeros round it, (rows of the frame, B)."""
    batch, channels, rows, columns = x_BCHW.shape
    y = x_BCHW.new_empty(channels * frame.rows, batch)
    strides = [0 if size == 1 else stride for size, stride in zip(x_BCHW.shape, x_BCHW.stride(), strict=True)]
    strides[0] = strides[0] if batch > 1 else 1
    _native.place(
        y.element_size(), x_BCHW.data_ptr(), *strides, rows, columns, frame.top, frame.left, y.data_ptr(),
        frame.rows * batch, channels, *frame.phases, frame.high, frame.wide, batch,
        _threads(MOVED * y.numel()),
    )  # fmt: skip
    return y


def block_of(values: Tensor) -> tuple[int, ...]:
    """Rows and columns of a place."""
    return tuple(values.shape[1:]) or (1, 1)


def places_of(row_ptr: Tensor, columns: Tensor, slots: Tensor | None) -> Any:
    """Places as the compiled module knows them; the tensors must live as long."""
    return _native.Places(
        row_ptr.numel() - 1, row_ptr.element_size(), columns.element_size(), row_ptr.data_ptr(), columns.data_ptr(),
        _address(slots),
    )  # fmt: skip


def _places(index: Places | Transposed) -> Any:
    return places_of(index.row_ptr, index.columns, index.slots if isinstance(index, Transposed) else None)


def _spmm(places, topology, grid, values, x_IB, bias, epilogue, positive, kept, *, transposed: bool = False) -> Tensor:
    (r, c) = block_of(values)
    out, into = (c, r) if transposed else (r, c)
    rows = grid[0] * out
    _check("the input", x_IB, grid[1] * into, x_IB.shape[1:])
    if len(values) != topology.size or values.dim() not in (1, 3) or (bias is not None and bias.shape != (rows,)):
        raise ValueError(
            f"expected {topology.size} values and {rows} biases, got {tuple(values.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    y = _rows(rows, x_IB.shape[1], x_IB.dtype) if x_IB.dim() == 2 else x_IB.new_empty(rows, *x_IB.shape[1:])
    weights = values.numel()
    x, values = _packed(x_IB, weights), values.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    bits = positive is not None or kept is not None
    (length, lines), (x_step, y_step) = _lines(x, y, merge=not bits)
    _native.spmm(
        places, y.element_size(), out, into, values.data_ptr(), x.data_ptr(), x.stride(0), x_step, y.data_ptr(), y.stride(0),
        y_step, length, lines, _threads(weights * length * lines), _address(bias), epilogue.slope, epilogue.drop_below,
        epilogue.scale, epilogue.seed, _address(positive), _address(kept), (length + 7) // 8 * lines,
    )  # fmt: skip
    return y


def _lines(a: Tensor, b: Tensor, *, merge: bool = True) -> tuple[tuple[int, int], tuple[int, int]]:
    """Columns in a line and number of lines, and from one line to the next in each; lines without a gap are one."""
    if a.dim() == 2:
        return (a.shape[1], 1), (0, 0)
    lines, length = a.shape[1:]
    steps = (a.stride(1), b.stride(1))
    if merge and steps == (length, length):
        return (length * lines, 1), (0, 0)
    return (length, lines), steps


def _flat(kept: Kept) -> Kept:
    def flat(bits: Tensor | None) -> Tensor | None:
        return None if bits is None else bits.flatten(0, 1)

    return Kept(kept.epilogue, flat(kept.positive), flat(kept.kept))


def _check(what: str, x: Tensor, features: int, columns: Sequence[int]) -> None:
    if x.shape != (features, *columns):
        raise ValueError(f"{what} must be {(features, *columns)} feature-major, got {tuple(x.shape)}")


def _rows(features: int, batch: int, dtype: torch.dtype) -> Tensor:
    """An empty (features, batch) tensor whose rows start on cache lines and spread over the sets of the cache."""
    ld = row_length(batch, dtype.itemsize)
    y = torch.empty((features, ld), dtype=dtype, device="cpu")  # the defaults are the user's to change
    return y if ld == batch else y[:, :batch]


def _readable(x: Tensor) -> Tensor:
    """``x`` with the batch contiguous within a feature."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else reference.transpose(x.t())


def _packed(x: Tensor, weights: int) -> Tensor:
    """``x`` where its rows lie well, else a copy that does if each row is used often enough to pay for it."""
    if x.dim() == 3:  # the rows of an image, which overlap
        return x if x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous()
    x = _readable(x)
    features, batch = x.shape
    row_bytes = x.stride(0) * x.element_size()
    well = row_bytes % LINE == 0 and row_bytes % PAGE != 0 and x.data_ptr() % LINE == 0
    if well or batch * x.element_size() < LINE or weights < REPACK_FROM * features:
        return x
    y = _rows(features, batch, x.dtype)
    _native.copy_rows(
        y.element_size(), x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), features, batch,
        _threads(MOVED * features * batch),
    )  # fmt: skip
    return y


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= PARALLEL_FROM else 1


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
