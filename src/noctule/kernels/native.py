"""The compiled products, for float32 tensors on the CPU.

Layouts that a row of the batch is read from at full speed: rows start on a cache line, and not a whole page apart, where all
of them would meet in the same few sets of the cache.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from noctule.kernels import reference
from noctule.kernels.epilogue import IDENTITY, Epilogue, Kept
from noctule.topology import Topology

_native: Any
try:
    from noctule import _native
except ImportError:
    _native = None

LINE = 16
"""Floats in a cache line."""
PAGE = 1024
"""Floats in a page."""
PARALLEL_FROM = 1 << 15
"""Multiply-adds (or elements moved) under which a second thread costs more than it gives."""
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
    topology: Topology, values: Tensor, x_IB: Tensor, bias: Tensor | None, epilogue: Epilogue, keep: bool
) -> tuple[Tensor, Kept]:
    """See `noctule.kernels.spmm`."""
    batch = x_IB.shape[1]
    positive = kept = None
    bits = topology.shape[0], (batch + 7) // 8
    if keep and epilogue.slope != 1.0:
        positive = torch.empty(bits, dtype=torch.uint8, device="cpu")
    if keep and epilogue.drop_below:
        kept = torch.empty(bits, dtype=torch.uint8, device="cpu")
    index = (topology.row_ptr, topology.columns, None)
    y_OB = _spmm(topology, index, topology.shape, values, x_IB, bias, epilogue, positive, kept)
    return y_OB, Kept(epilogue, positive, kept)


def spmm_t(topology: Topology, values: Tensor, dy_OB: Tensor) -> Tensor:
    """See `noctule.kernels.spmm_t`."""
    return _spmm(topology, topology.transposed, topology.shape[::-1], values, dy_OB, None, IDENTITY, None, None)


def sddmm(topology: Topology, dy_OB: Tensor, x_IB: Tensor) -> Tensor:
    """See `noctule.kernels.sddmm`."""
    return gradients(topology, dy_OB, x_IB, False)[0]


def gradients(topology: Topology, dy_OB: Tensor, x_IB: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """See `noctule.kernels.gradients`."""
    batch = x_IB.shape[1]
    _check("the gradient", dy_OB, topology.shape[0], batch)
    _check("the input", x_IB, topology.shape[1], batch)
    dvalues, dbias = _empty(topology.size), _empty(topology.shape[0]) if bias else None
    row_ptr, columns = topology.row_ptr, topology.columns
    dy, x = _packed(dy_OB, topology.size), _packed(x_IB, topology.size)
    _native.sddmm(
        topology.shape[0], row_ptr.element_size(), columns.element_size(), row_ptr.data_ptr(), columns.data_ptr(),
        dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), dvalues.data_ptr(), _address(dbias), batch,
        _threads(topology.size * batch),
    )  # fmt: skip
    return dvalues, dbias


def epilogue_backward(dy_OB: Tensor, kept: Kept, bias: bool) -> tuple[Tensor, Tensor | None]:
    """See `noctule.kernels.epilogue_backward`."""
    rows, batch = dy_OB.shape
    dy = _readable(dy_OB)
    changed = kept.positive is not None or kept.kept is not None
    if not changed and not bias:
        return dy, None
    dz = _rows(rows, batch) if changed else dy
    dbias = _empty(rows) if bias else None
    _native.epilogue_backward(
        dy.data_ptr(), dy.stride(0), _address(dz) if changed else 0, dz.stride(0), _address(dbias), rows, batch,
        _threads(rows * batch), kept.epilogue.slope, kept.epilogue.scale, _address(kept.positive), _address(kept.kept),
        (batch + 7) // 8,
    )  # fmt: skip
    return dz, dbias


def transpose(x_BI: Tensor) -> Tensor:
    """(I, B), the batch contiguous."""
    batch, features = x_BI.shape
    x = x_BI if x_BI.stride(1) == 1 or features == 1 else x_BI.contiguous()
    x_IB = _rows(features, batch)
    _native.transpose(
        x.data_ptr(), x.stride(0), x_IB.data_ptr(), x_IB.stride(0), batch, features, _threads(batch * features)
    )
    return x_IB


def _spmm(topology, index, shape, values, x_IB, bias, epilogue, positive, kept) -> Tensor:
    batch = x_IB.shape[1]
    _check("the input", x_IB, shape[1], batch)
    if values.shape != (topology.size,) or (bias is not None and bias.shape != (shape[0],)):
        raise ValueError(
            f"expected {topology.size} values and {shape[0]} biases, got {tuple(values.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    row_ptr, columns, slots = index
    x, y, values = _packed(x_IB, topology.size), _rows(shape[0], batch), values.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    _native.spmm(
        shape[0], row_ptr.element_size(), columns.element_size(), row_ptr.data_ptr(), columns.data_ptr(), _address(slots),
        values.data_ptr(), x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), batch, _threads(topology.size * batch),
        _address(bias), epilogue.slope, epilogue.drop_below, epilogue.scale, epilogue.seed, _address(positive),
        _address(kept), (batch + 7) // 8,
    )  # fmt: skip
    return y


def _check(what: str, x: Tensor, features: int, batch: int) -> None:
    if x.shape != (features, batch):
        raise ValueError(f"{what} must be ({features}, {batch}) feature-major, got {tuple(x.shape)}")


def _rows(features: int, batch: int) -> Tensor:
    """An empty (features, batch) tensor whose rows start on cache lines and spread over the sets of the cache."""
    if batch < LINE:
        return _empty(features, batch)
    ld = -(-batch // LINE) * LINE
    if ld % PAGE == 0:
        ld += LINE
    return _empty(features, ld) if ld == batch else _empty(features, ld)[:, :batch]


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # the defaults are the user's to change


def _readable(x: Tensor) -> Tensor:
    """``x`` with the batch contiguous within a feature."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else reference.transpose(x.t())


def _packed(x: Tensor, weights: int) -> Tensor:
    """``x`` where its rows lie well, else a copy that does if each row is used often enough to pay for it."""
    x = _readable(x)
    features, batch = x.shape
    ld = x.stride(0)
    well = ld % LINE == 0 and ld % PAGE != 0 and x.data_ptr() % 64 == 0
    if well or batch < LINE or weights < REPACK_FROM * features:
        return x
    y = _rows(features, batch)
    _native.copy_rows(x.data_ptr(), ld, y.data_ptr(), y.stride(0), features, batch, _threads(features * batch))
    return y


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= PARALLEL_FROM else 1


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
