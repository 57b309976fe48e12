"""The products in plain torch: the oracle of the tests, and what runs where the compiled module cannot.

Time O(N B), memory O(N + activations): the non-zeros pass in chunks and nothing dense is ever made. Any dtype and device;
half precision adds up in float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from noctule.kernels.epilogue import Epilogue, Kept
from noctule.topology import Topology

CHUNK_ELEMENTS = 1 << 22
"""Numbers in flight at once (16 MiB in float32)."""

_WORD = 0xFFFFFFFF
_LONG = (1 << 64) - 1


def spmm(
    topology: Topology, values: Tensor, x_IB: Tensor, bias: Tensor | None, epilogue: Epilogue, keep: bool
) -> tuple[Tensor, Kept]:
    """See `noctule.kernels.spmm`."""
    z_OB = _accumulate(topology.shape[0], topology.rows(), topology.columns.to(torch.int64), values, x_IB)
    if bias is not None:
        z_OB += bias.to(z_OB.dtype)[:, None]
    positive = kept = None
    if epilogue.slope != 1.0:
        on = z_OB > 0
        z_OB = torch.where(on, z_OB, z_OB * epilogue.slope)
        positive = _pack(on) if keep else None
    if epilogue.drop_below:
        on = random_words(epilogue.seed, *z_OB.shape, device=z_OB.device) >= epilogue.drop_below
        z_OB = torch.where(on, z_OB * epilogue.scale, 0.0)
        kept = _pack(on) if keep else None
    return z_OB.to(values.dtype), Kept(epilogue, positive, kept)


def spmm_t(topology: Topology, values: Tensor, dy_OB: Tensor) -> Tensor:
    """See `noctule.kernels.spmm_t`."""
    dx_IB = _accumulate(topology.shape[1], topology.columns.to(torch.int64), topology.rows(), values, dy_OB)
    return dx_IB.to(values.dtype)


def sddmm(topology: Topology, dy_OB: Tensor, x_IB: Tensor) -> Tensor:
    """See `noctule.kernels.sddmm`."""
    return gradients(topology, dy_OB, x_IB, False)[0]


def gradients(topology: Topology, dy_OB: Tensor, x_IB: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """See `noctule.kernels.gradients`."""
    rows, columns = topology.rows(), topology.columns.to(torch.int64)
    dy, x = dy_OB.to(_sum_dtype(dy_OB)), x_IB.to(_sum_dtype(x_IB))
    dvalues = torch.empty(topology.size, dtype=dy.dtype, device=dy.device)
    for part in _chunks(topology.size, dy.shape[1]):
        dvalues[part] = (dy[rows[part]] * x[columns[part]]).sum(1)
    return dvalues.to(dy_OB.dtype), dy.sum(1).to(dy_OB.dtype) if bias else None


def epilogue_backward(dy_OB: Tensor, kept: Kept, bias: bool) -> tuple[Tensor, Tensor | None]:
    """See `noctule.kernels.epilogue_backward`."""
    batch, dz_OB = dy_OB.shape[1], dy_OB
    if kept.positive is not None:
        dz_OB = torch.where(_unpack(kept.positive, batch), dz_OB, dz_OB * kept.epilogue.slope)
    if kept.kept is not None:
        dz_OB = torch.where(_unpack(kept.kept, batch), dz_OB * kept.epilogue.scale, 0.0)
    return dz_OB, dz_OB.to(_sum_dtype(dz_OB)).sum(1).to(dz_OB.dtype) if bias else None


def transpose(x_BI: Tensor) -> Tensor:
    """(I, B), the batch contiguous."""
    return x_BI.t().contiguous()


def random_words(seed: int, rows: int, columns: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The random 32-bit words of the dropout as (rows, columns) int64: one hash for each (seed, row, column)."""
    key = torch.arange(1, rows + 1, dtype=torch.int64, device=device) * _signed(0x9E3779B97F4A7C15) + _signed(seed)
    key = (key ^ _shifted(key, 30)) * _signed(0xBF58476D1CE4E5B9)
    key = (key ^ _shifted(key, 27)) * _signed(0x94D049BB133111EB)
    key = (key ^ _shifted(key, 31))[:, None]
    x = (torch.arange(columns, dtype=torch.int64, device=device) + key) & _WORD
    x = (x ^ x >> 16) * 0x21F0AAAD & _WORD
    x = (x ^ x >> 15) + _shifted(key, 32) & _WORD
    x = (x ^ x >> 15) * 0xD35A2D97 & _WORD
    return x ^ x >> 15


def _accumulate(size: int, to: Tensor, source: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """y[to[k]] += values[k] * x[source[k]]."""
    x = x.to(_sum_dtype(x))
    y = torch.zeros(size, x.shape[1], dtype=x.dtype, device=x.device)
    for part in _chunks(values.numel(), x.shape[1]):
        y.index_add_(0, to[part], values[part, None].to(x.dtype) * x[source[part]])
    return y


def _chunks(size: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(width, 1))
    return (slice(at, at + step) for at in range(0, size, step))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _pack(bits: Tensor) -> Tensor:
    rows, columns = bits.shape
    bits = torch.nn.functional.pad(bits.to(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(2, dtype=torch.uint8)


def _unpack(packed: Tensor, columns: int) -> Tensor:
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(1)[:, :columns].bool()


def _signed(x: int) -> int:
    x &= _LONG
    return x - (1 << 64) if x >> 63 else x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """The 64-bit words shifted to the right without their sign."""
    return x >> bits & (1 << 64 - bits) - 1
