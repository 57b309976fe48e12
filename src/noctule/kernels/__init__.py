"""How is a sparse product computed? Each call is sent to the fastest code for its device, type and shape.

Shapes: B batch, I in, O out, N places. A place is a weight, values (N,), or a block of R x C weights, values (N, R, C): the
topology is then that of the grid of blocks, (O / R, I / C). Activations are feature-major: (I, B), the batch contiguous within a
feature. Where a product is a convolution (see `noctule.kernels.frame`) they have lines: (I, L, B), and results are (O, L, B).

=========== ===================================================
``spmm``      Y = W X, then bias, activation and dropout
``spmm_t``    dX = Wᵀ dY
``sddmm``     dW at the N places only, of dY Xᵀ
=========== ===================================================

float32 and bfloat16 on the CPU go to `native`; blocks of 16, 32 or 64 on a CUDA device to `triton`, in float32, float16 and
bfloat16; all else, and machines without the compiled module or without Triton, to `reference`. Factors of two dtypes are both taken
as the wider, which is then that of the result.
"""

import functools
import importlib
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from noctule.core.topology import Places, Topology
from noctule.kernels import native, reference, steps
from noctule.kernels.epilogue import IDENTITY, Epilogue, Kept
from noctule.kernels.flops import modes, report
from noctule.kernels.frame import Frame
from noctule.measure.operations import count

__all__ = [
    "IDENTITY",
    "Epilogue",
    "Frame",
    "Kept",
    "backward",
    "epilogue_backward",
    "feature_major",
    "forward",
    "gradients",
    "place",
    "sddmm",
    "spmm",
    "spmm_t",
]


def spmm(
    topology: Places,
    values: Tensor,
    x_IB: Tensor,
    bias: Tensor | None = None,
    epilogue: Epilogue = IDENTITY,
    *,
    keep: bool = False,
) -> tuple[Tensor, Kept]:
    """Y (O, B) = W X + bias through the epilogue; with ``keep``, also what the epilogue's backward needs."""
    values, x_IB = _alike(values, x_IB)
    _count(values.numel() * math.prod(x_IB.shape[1:]))
    return _code_for(values, x_IB, block=_block(values)).spmm(topology, values, x_IB, bias, epilogue, keep)


def spmm_t(topology: Places, values: Tensor, dy_OB: Tensor) -> Tensor:
    """dX (I, B) = Wᵀ dY."""
    values, dy_OB = _alike(values, dy_OB)
    _count(values.numel() * math.prod(dy_OB.shape[1:]))
    return _code_for(values, dy_OB, block=_block(values)).spmm_t(topology, values, dy_OB)


def sddmm(topology: Places, dy_OB: Tensor, x_IB: Tensor) -> Tensor:
    """dW (N,), or (N, R, C), = the places of dY Xᵀ."""
    return gradients(topology, dy_OB, x_IB, bias=False)[0]


def gradients(topology: Places, dy_OB: Tensor, x_IB: Tensor, *, bias: bool) -> tuple[Tensor, Tensor | None]:
    """dW (N,), or (N, R, C), and where asked the gradient of the bias (O,): sums of rows of dY, which are read anyway."""
    dy_OB, x_IB = _alike(dy_OB, x_IB)
    block = reference.block_of(topology, dy_OB, x_IB)
    _count(topology.size * math.prod(block) * math.prod(x_IB.shape[1:]))
    return _code_for(dy_OB, x_IB, block=block).gradients(topology, dy_OB, x_IB, bias)


def epilogue_backward(dy_OB: Tensor, kept: Kept, *, bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient before the epilogue (O, B), and of the bias (O,) where asked for."""
    return _code_for(dy_OB).epilogue_backward(dy_OB, kept, bias)


def forward(
    topology: Topology, values: Tensor, x_BI: Tensor, bias: Tensor | None, epilogue: Epilogue, *, keep: bool
) -> tuple[Tensor, Tensor | None, Kept]:
    """A linear layer's y (B, O); its input as (I, B) where a transpose was made for it; what the epilogue's backward needs."""
    values, x_BI = _alike(values, x_BI)
    code = _code_for(values, x_BI, block=_block(values))
    if code is native and x_BI.numel():
        _count(values.numel() * x_BI.shape[0])
        return steps.forward(topology, values, x_BI, bias, epilogue, keep)
    x_IB = feature_major(x_BI)
    y_OB, kept = spmm(topology, values, x_IB, bias, epilogue, keep=keep)
    as_given = x_BI.stride(0) == 1 or x_BI.shape[0] == 1
    return y_OB.t().data, None if as_given else x_IB.data, kept  # no views, which an in-place ReLU may not touch


def backward(
    topology: Topology,
    values: Tensor,
    x: Tensor,
    dy_BO: Tensor,
    kept: Kept,
    needs: tuple[bool, bool, bool],
    *,
    by_batch: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dz (O, B) before the epilogue, None where it is dy; where needed the gradients of input (B, I), values, and bias (O,).

    ``x`` is feature-major: (I, B) as `forward` made it where the input was given by the batch, else (B, I) as it was given.
    """
    values, dy_BO = _alike(values, dy_BO)
    needs_x, needs_values, needs_bias = needs
    if x.dtype is dy_BO.dtype and dy_BO.numel() and _code_for(values, dy_BO, block=_block(values)) is native:
        _count(values.numel() * dy_BO.shape[0] * (needs_x + needs_values))
        return steps.backward(topology, values, x, dy_BO, kept, needs, by_batch)
    dz_OB, dbias = epilogue_backward(feature_major(dy_BO), kept, bias=needs_bias and not needs_values)
    dvalues = None
    if needs_values:
        dvalues, dbias = gradients(topology, dz_OB, x if by_batch else feature_major(x), bias=needs_bias)
    dx_BI = spmm_t(topology, values, dz_OB).t() if needs_x else None
    return dz_OB, dx_BI, dvalues, dbias


def feature_major(x_BI: Tensor) -> Tensor:
    """``x`` (B, I) as (I, B) with the batch contiguous: a view where it already lies so, else one transpose."""
    if x_BI.shape[0] == 1 or x_BI.stride(0) == 1:
        return x_BI.t()
    return _code_for(x_BI).transpose(x_BI)


def place(x_BCHW: Tensor, frame: Frame) -> Tensor:
    """An image with zeros round it, in the layout that shifted rows are read from: (rows of the frame, B)."""
    return _code_for(x_BCHW).place(x_BCHW, frame)


def _count(multiply_adds: int) -> None:
    count(multiply_adds)
    if modes():
        report(multiply_adds)


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dtype is b.dtype:
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _block(values: Tensor) -> tuple[int, ...]:
    return (1, 1) if values.dim() == 1 else tuple(values.shape[1:])


def _code_for(*tensors: Tensor, block: tuple[int, ...] = (1, 1)) -> Any:
    if block != (1, 1) and tensors[0].is_cuda:
        triton = _triton() if min(block) >= 16 and all(t.is_cuda for t in tensors) else None
        return triton if triton and triton.takes(tensors[0].dtype, block) else reference
    for t in tensors:
        if t.dtype not in native.DTYPES or not t.is_cpu:
            return reference
    if block != (1, 1) and not (block[0] in native.BLOCKS and block[1] in native.BLOCKS):
        return reference
    return native if native.available() else reference


@functools.cache
def _triton() -> Any:
    """The module of the CUDA kernels, imported on the first use of a block there; nothing, with a warning, without Triton."""
    try:
        return importlib.import_module("noctule.kernels.triton")
    except ImportError as error:
        warnings.warn(
            f"Triton cannot be imported ({error}), the products of blocks on a CUDA device run in plain torch (slow): "
            "pip install triton",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
