"""The products in plain torch: the oracle of the tests, and what runs where the compiled module cannot.

Places are single weights, values (N,), or blocks of R x C, values (N, R, C) at the places of the grid of blocks.
Time O(N B), memory O(N + activations): the non-zeros pass in chunks and nothing dense is ever made. Any dtype and device;
half precision adds up in float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from noctule.core.topology import Places, Transposed
from noctule.kernels.epilogue import Epilogue, Kept
from noctule.kernels.frame import Frame

CHUNK_ELEMENTS = 1 << 22
"""Numbers in flight at once (16 MiB in float32)."""

_WORD = 0xFFFFFFFF
_LONG = (1 << 64) - 1


def spmm(
    topology: Places, values: Tensor, x_IB: Tensor, bias: Tensor | None, epilogue: Epilogue, keep: bool
) -> tuple[Tensor, Kept]:
    """Y (O, B) = W X + bias through the epilogue, and what its backward needs."""
    z_OB = _accumulate(topology.shape[0], _rows(topology), topology.columns.to(torch.int64), values, x_IB)
    z_OB, kept = finished(z_OB, bias, epilogue, keep)
    return z_OB.to(values.dtype), kept


def finished(z_OB: Tensor, bias: Tensor | None, epilogue: Epilogue, keep: bool) -> tuple[Tensor, Kept]:
    """A product through bias, activation and dropout, and what the backward of these needs; z may be written to."""
    if bias is not None:
        z_OB += _beside(bias.to(z_OB.dtype), z_OB)
    positive = kept = None
    if epilogue.slope != 1.0:
        on = z_OB > 0
        z_OB = torch.where(on, z_OB, z_OB * epilogue.slope)
        positive = _pack(on) if keep else None
    if epilogue.drop_below:
        words = random_words(epilogue.seed, z_OB.shape[0], z_OB[:1].numel(), device=z_OB.device)
        on = words.view_as(z_OB) >= epilogue.drop_below
        z_OB = torch.where(on, z_OB * epilogue.scale, 0.0)
        kept = _pack(on) if keep else None
    return z_OB, Kept(epilogue, positive, kept)


def spmm_t(topology: Places, values: Tensor, dy_OB: Tensor) -> Tensor:
    """dX (I, B) = Wᵀ dY."""
    back = topology.transposed
    order = back.slots.to(torch.int64)
    values = values[order] if values.dim() == 1 else values[order].mT
    dx_IB = _accumulate(back.row_ptr.numel() - 1, _rows(back), back.columns.to(torch.int64), values, dy_OB)
    return dx_IB.to(values.dtype)


def sddmm(topology: Places, dy_OB: Tensor, x_IB: Tensor) -> Tensor:
    """dW (N,) = the places of dY Xᵀ."""
    return gradients(topology, dy_OB, x_IB, False)[0]


def gradients(topology: Places, dy_OB: Tensor, x_IB: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """dW (N,) and, with ``bias``, that of the bias (O,)."""
    rows, columns = _rows(topology), topology.columns.to(torch.int64)
    dy, over = dy_OB.to(_sum_dtype(dy_OB)), tuple(range(1, dy_OB.dim()))
    if (block := block_of(topology, dy_OB, x_IB)) != (1, 1):
        r, c = block
        dvalues = torch.empty(topology.size, r, c, dtype=dy.dtype, device=dy.device)
        for part in _chunks(topology.size, (r + c) * dy.shape[1]):
            x_NCB = x_IB.unflatten(0, (-1, c))[columns[part]].to(dy.dtype)
            dvalues[part] = dy.unflatten(0, (-1, r))[rows[part]] @ x_NCB.mT
        return dvalues.to(dy_OB.dtype), dy.sum(over).to(dy_OB.dtype) if bias else None
    dvalues = torch.empty(topology.size, dtype=dy.dtype, device=dy.device)
    for part in _chunks(topology.size, dy[:1].numel()):
        dvalues[part] = (dy[rows[part]] * x_IB[columns[part]].to(dy.dtype)).sum(over)
    return dvalues.to(dy_OB.dtype), dy.sum(over).to(dy_OB.dtype) if bias else None


def epilogue_backward(dy_OB: Tensor, kept: Kept, bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient before the epilogue (O, B) and, with ``bias``, that of the bias (O,)."""
    batch, dz_OB = dy_OB.shape[-1], dy_OB.to(_sum_dtype(dy_OB))
    if kept.positive is not None:
        dz_OB = torch.where(_unpack(kept.positive, batch), dz_OB, dz_OB * kept.epilogue.slope)
    if kept.kept is not None:
        dz_OB = torch.where(_unpack(kept.kept, batch), dz_OB * kept.epilogue.scale, 0.0)
    return dz_OB.to(dy_OB.dtype), dz_OB.flatten(1).sum(1).to(dy_OB.dtype) if bias else None


def transpose(x_BI: Tensor) -> Tensor:
    """(I, B), the batch contiguous."""
    return x_BI.t().contiguous()


def place(x_BCHW: Tensor, frame: Frame) -> Tensor:
    """An image with zeros round it, (rows of the frame, B)."""
    batch, channels = x_BCHW.shape[:2]
    (ph, pw), high, wide = frame.phases, frame.high, frame.wide
    y = x_BCHW.new_zeros(channels, frame.rows, batch)
    padded = x_BCHW.new_zeros(channels, high * ph, wide * pw, batch)
    # what of the image lies within: a crop may begin before it and end after it
    top, left = max(frame.top, 0), max(frame.left, 0)
    x = x_BCHW.permute(1, 2, 3, 0)[:, max(-frame.top, 0) :, max(-frame.left, 0) :]
    x = x[:, : max(high * ph - top, 0), : max(wide * pw - left, 0)]
    padded[:, top : top + x.shape[1], left : left + x.shape[2]] = x
    phases = padded.view(channels, high, ph, wide, pw, batch).permute(0, 2, 4, 1, 3, 5)
    y[:, : ph * pw * high * wide] = phases.reshape(channels, -1, batch)
    return y.view(-1, batch)


def random_words(seed: int | Tensor, rows: int, columns: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The random 32-bit words of the dropout as (rows, columns) int64: one hash for each (seed, row, column)."""
    seed = _signed(seed) if isinstance(seed, int) else seed
    key = torch.arange(1, rows + 1, dtype=torch.int64, device=device) * _signed(0x9E3779B97F4A7C15) + seed
    key = (key ^ _shifted(key, 30)) * _signed(0xBF58476D1CE4E5B9)
    key = (key ^ _shifted(key, 27)) * _signed(0x94D049BB133111EB)
    key = (key ^ _shifted(key, 31))[:, None]
    x = (torch.arange(columns, dtype=torch.int64, device=device) + key) & _WORD
    x = (x ^ x >> 16) * 0x21F0AAAD & _WORD
    x = (x ^ x >> 15) + _shifted(key, 32) & _WORD
    x = (x ^ x >> 15) * 0xD35A2D97 & _WORD
    return x ^ x >> 15


def block_of(topology: Places, dy_OB: Tensor, x_IB: Tensor) -> tuple[int, int]:
    """Rows and columns of a place, where the places are blocks of a weight with these outputs and inputs."""
    rows, columns = topology.shape
    whole = rows and columns and dy_OB.shape[0] % rows == x_IB.shape[0] % columns == 0
    if not whole or dy_OB.dim() != 2 or 0 in (len(dy_OB), len(x_IB)):
        return 1, 1
    return len(dy_OB) // rows, len(x_IB) // columns


def _accumulate(size: int, to: Tensor, source: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """y[to[k]] += values[k] * x[source[k]]; of blocks (N, R, C), y has R rows for each and x C."""
    if values.dim() == 3:
        (r, c), batch = values.shape[1:], x.shape[1]
        y, x = torch.zeros(size, r, batch, dtype=_sum_dtype(x), device=x.device), x.unflatten(0, (-1, c))
        for part in _chunks(len(values), (r + c) * batch):
            y.index_add_(0, to[part], values[part].to(y.dtype) @ x[source[part]].to(y.dtype))
        return y.flatten(0, 1)
    y = torch.zeros(size, *x.shape[1:], dtype=_sum_dtype(x), device=x.device)
    for part in _chunks(values.numel(), y[:1].numel()):
        y.index_add_(0, to[part], _beside(values[part].to(y.dtype), y) * x[source[part]].to(y.dtype))
    return y


def _rows(places: Places | Transposed) -> Tensor:
    counts = places.row_ptr.diff().to(torch.int64)
    return torch.arange(counts.numel(), device=counts.device).repeat_interleave(
        counts, output_size=places.columns.numel()
    )


def _beside(numbers: Tensor, y: Tensor) -> Tensor:
    """A number for each row, shaped to multiply or add to the rows."""
    return numbers.view(-1, *[1] * (y.dim() - 1))


def _chunks(size: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(width, 1))
    return (slice(at, at + step) for at in range(0, size, step))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _pack(bits: Tensor) -> Tensor:
    *lines, columns = bits.shape
    bits = torch.nn.functional.pad(bits.to(torch.uint8), (0, -columns % 8)).view(*lines, (columns + 7) // 8, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, columns: int) -> Tensor:
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :columns].bool()


def _signed(x: int) -> int:
    x &= _LONG
    return x - (1 << 64) if x >> 63 else x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """The 64-bit words shifted to the right without their sign."""
    return x >> bits & (1 << 64 - bits) - 1
