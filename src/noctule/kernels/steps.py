"""A step of a linear layer on the compiled products: one call for the way there and one for the way back.

What `noctule.kernels` offers as single products is done here without a tensor between them that nothing reads again. Shapes are
checked once, and the places are handed over as objects that were made with the topology.
"""

from typing import Any

import torch
from torch import Tensor

from noctule.core.topology import Topology
from noctule.kernels import native
from noctule.kernels.epilogue import Epilogue, Kept
from noctule.kernels.frame import LINE, PAGE, row_length

AS_THEY_ARE, BY_BATCH, MISPLACED, STRIDED = 0, 1, 2, 3
"""How activations are given: feature-major rows that lie well, rows of the batch, feature-major rows that do not; or neither."""


def forward(
    topology: Topology, values: Tensor, x_BI: Tensor, bias: Tensor | None, epilogue: Epilogue, keep: bool
) -> tuple[Tensor, Tensor | None, Kept]:
    """y (B, O), a transposed view; x feature-major (I, B) where it was not given so; and what the way back needs.

    Raises:
        ValueError: values, bias and input do not fit together.
    """
    (batch, features), (rows, columns) = x_BI.shape, topology.shape
    r, c = values.shape[1:] if values.dim() == 3 else (1, 1)
    outputs, size = rows * r, x_BI.itemsize
    if features != columns * c or len(values) != topology.size or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(
            f"a weight of {topology.size} places of {r} x {c}, grid {topology.shape}, does not fit values {tuple(values.shape)}, "
            f"inputs {tuple(x_BI.shape)} and biases {None if bias is None else tuple(bias.shape)}"
        )
    given, x_ld = _given(x_BI, values.numel())
    if given == STRIDED:
        x_BI, given, x_ld = x_BI.contiguous(), BY_BATCH, features
    scratch, scratch_ld, address = None, 0, 0
    if given:
        scratch_ld = row_length(batch, size)
        scratch = torch.empty_strided((features, batch), (scratch_ld, 1), dtype=x_BI.dtype, device="cpu")
        address = scratch.data_ptr()
    y_ld = row_length(batch, size)
    y_BO = torch.empty_strided((batch, outputs), (1, y_ld), dtype=x_BI.dtype, device="cpu")
    if not values.is_contiguous():
        values = values.contiguous()
    if bias is not None and not (bias.dtype is torch.float32 and bias.is_contiguous()):
        bias = bias.to(torch.float32).contiguous()
    positive = kept = None
    positive_at = kept_at = below = 0
    scale = 1.0
    if epilogue.slope != 1.0 and keep:
        positive = torch.empty((outputs, (batch + 7) // 8), dtype=torch.uint8, device="cpu")
        positive_at = positive.data_ptr()
    if epilogue.dropout:
        below, scale = epilogue.drop_below, epilogue.scale
        if keep and below:
            kept = torch.empty((outputs, (batch + 7) // 8), dtype=torch.uint8, device="cpu")
            kept_at = kept.data_ptr()
    native._native.forward(
        _handles(topology).there, size, r, c, features, batch, values.data_ptr(), 0 if bias is None else bias.data_ptr(),
        x_BI.data_ptr(), x_ld, given, address, scratch_ld, y_BO.data_ptr(), y_ld, epilogue.slope, below, scale, epilogue.seed,
        positive_at, kept_at, torch.get_num_threads(), native.PARALLEL_FROM,
    )  # fmt: skip
    return y_BO, scratch if given == BY_BATCH else None, Kept(epilogue, positive, kept)


def backward(
    topology: Topology,
    values: Tensor,
    x: Tensor,
    dy_BO: Tensor,
    kept: Kept,
    needs: tuple[bool, bool, bool],
    by_batch: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dz (O, B) before the epilogue, None where it is dy; where needed the gradients of input (B, I), values, and bias (O,).

    Args:
        topology: of the weight.
        values: (N,) or (N, R, C).
        x: the input feature-major, (I, B) where it was made so (``by_batch``), else (B, I) as it was given.
        dy_BO: the gradient behind the epilogue.
        kept: of the way there.
        needs: whether the gradient of the input, of the values, of the bias is wanted.
        by_batch: whether the input was given by the batch; so is then its gradient.
    """
    (batch, outputs), size, dtype = dy_BO.shape, dy_BO.itemsize, dy_BO.dtype
    features, x_ld = (x.shape[0], x.stride(0)) if by_batch else (x.shape[1], x.stride(1))
    needs_x, needs_values, needs_bias = needs
    r, c = values.shape[1:] if values.dim() == 3 else (1, 1)
    weights, ld = values.numel(), row_length(batch, size)
    if not values.is_contiguous():
        values = values.contiguous()
    given, dy_ld = _given(dy_BO, weights)
    if given == STRIDED:
        dy_BO, given, dy_ld = dy_BO.contiguous(), BY_BATCH, outputs
    dz_at = dz_ld = x_at = x_given = values_at = bias_at = dx_at = rows_at = 0
    dz_OB = None
    if given or kept.changed:
        dz_ld = ld
        dz_OB = torch.empty_strided((outputs, batch), (ld, 1), dtype=dtype, device="cpu")
        dz_at = dz_OB.data_ptr()
    dvalues = dbias = dx_BI = dx = x_scratch = None
    if needs_values:
        dvalues = torch.empty(values.shape, dtype=dtype, device="cpu")
        values_at, x_given = dvalues.data_ptr(), _misplaced(x, x_ld, features, batch, weights)
        if x_given:
            x_scratch = torch.empty_strided((features, batch), (ld, 1), dtype=dtype, device="cpu")
            x_at = x_scratch.data_ptr()
    if needs_bias:
        dbias = torch.empty(outputs, dtype=dtype, device="cpu")
        bias_at = dbias.data_ptr()
    handles = _handles(topology)
    if needs_x:
        dx = dx_BI = torch.empty_strided((batch, features), (1, ld), dtype=dtype, device="cpu")
        dx_at = dx.data_ptr()
        if by_batch:
            dx_BI = torch.empty((batch, features), dtype=dtype, device="cpu")
            rows_at = dx_BI.data_ptr()
    positive, bits = kept.positive, kept.kept
    epilogue = kept.epilogue
    native._native.backward(
        handles.there, handles.back(topology) if needs_x else handles.there, size, r, c, features, outputs, batch,
        values.data_ptr(), x.data_ptr(), x_ld, x_given, x_at, ld, dy_BO.data_ptr(), dy_ld, given, dz_at, dz_ld,
        needs_values, values_at, bias_at, dx_at, ld, rows_at, epilogue.slope, epilogue.scale if epilogue.dropout else 1.0,
        0 if positive is None else positive.data_ptr(), 0 if bits is None else bits.data_ptr(), torch.get_num_threads(),
        native.PARALLEL_FROM,
    )  # fmt: skip
    return dz_OB, dx_BI, dvalues, dbias


def _given(x_BF: Tensor, weights: int) -> tuple[int, int]:
    """In what way activations are given, and how many numbers lie from one row to the next of what is contiguous."""
    (batch, features), (across, along) = x_BF.shape, x_BF.stride()
    if across == 1 or batch == 1:
        return _misplaced(x_BF, along, features, batch, weights), along
    return BY_BATCH if along == 1 or features == 1 else STRIDED, across


def _misplaced(x: Tensor, ld: int, features: int, batch: int, weights: int) -> int:
    """Whether feature-major rows are to be copied to where they lie well."""
    size = x.itemsize
    row_bytes = ld * size
    well = row_bytes % LINE == 0 and row_bytes % PAGE and x.data_ptr() % LINE == 0
    few = batch * size < LINE or weights < native.REPACK_FROM * features
    return AS_THEY_ARE if well or few else MISPLACED


class Handles:
    """What the compiled module knows a topology by; made once for each."""

    nbytes = 0

    def __init__(self, topology: Topology) -> None:
        self.there = native.places_of(topology.row_ptr, topology.columns, None)
        self._back: Any = None

    def back(self, topology: Topology) -> Any:
        """Of the transpose."""
        if self._back is None:
            back = topology.transposed
            self._back = native.places_of(back.row_ptr, back.columns, back.slots)
        return self._back


def _handles(topology: Topology) -> Handles:
    made = topology.derived.get(Handles)
    if made is None:
        made = topology.derived[Handles] = Handles(topology)
    return made
