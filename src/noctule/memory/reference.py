"""The elementary steps in plain torch: the oracle of the tests, and what runs on CUDA and where the compiled module is missing.

Shapes: N elements in G groups of E, a multiple of 8; the last group is shorter.
"""

import torch
from torch import Tensor

from noctule.codecs.reference import in_buckets, nbytes, pack_bits, unpack_bits


def ranges(x_N: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest and highest element of each group (NaN where one is not finite), and how many are not zero: int32."""
    x_GE = in_buckets(x_N, group)
    rest = x_N.numel() % group
    low, high = x_GE.amin(1), x_GE.amax(1)
    if rest:
        low[-1], high[-1] = x_GE[-1, :rest].amin(), x_GE[-1, :rest].amax()
    finite = low.isfinite() & high.isfinite()
    nan = low.new_tensor(torch.nan)
    return low.where(finite, nan), high.where(finite, nan), (x_GE != 0).sum(1, dtype=torch.int32)


def encode(
    x_N: Tensor,
    group: int,
    inverse_G: Tensor,
    base_G: Tensor,
    bits: int,
    offsets_G: Tensor,
    nbytes_codes: int,
    bitmap: bool,
) -> tuple[Tensor, Tensor | None]:
    """Codes round(x * inverse - base) side by side, those of a group from its offset in bytes on, and the bitmap.

    With ``bitmap``, only elements that are not zero have codes.
    """
    x_GE = in_buckets(x_N, group)
    codes_GE = (x_GE * inverse_G[:, None] - base_G[:, None]).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    codes_GE.view(-1)[x_N.numel() :] = 0
    there_GE = x_GE != 0
    mask = None
    if bitmap:
        mask = pack_bits(there_GE.flatten().to(torch.uint8), 1)
        left_GE = torch.zeros_like(codes_GE)
        rows, columns = there_GE.nonzero(as_tuple=True)
        left_GE[rows, there_GE.cumsum(1)[rows, columns] - 1] = codes_GE[rows, columns]
        codes_GE = left_GE
    counts_G = _counts(there_GE, x_N.numel(), bitmap)
    rows_GB = pack_bits(codes_GE.flatten(), bits).view(len(x_GE), -1)
    return rows_GB[_used(rows_GB, counts_G, bits)][:nbytes_codes], mask


def decode(
    codes: Tensor,
    n: int,
    group: int,
    scale_G: Tensor,
    base_G: Tensor,
    bits: int,
    offsets_G: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """float32 (N,): (code + base) * scale, zero where the bitmap has none."""
    groups = len(scale_G)
    there_GE = None if mask is None else unpack_bits(mask, groups * group, 1).view(groups, group).to(torch.bool)
    counts_G = _counts(there_GE if there_GE is not None else codes.new_empty(groups, group), n, mask is not None)
    rows_GB = codes.new_zeros(groups, nbytes(group, bits))
    rows_GB[_used(rows_GB, counts_G, bits)] = codes
    codes_GE = unpack_bits(rows_GB.flatten(), groups * group, bits).view(groups, group)
    if there_GE is not None:
        codes_GE = codes_GE.gather(1, (there_GE.cumsum(1) - 1).clamp_(0))
    x_GE = (codes_GE.to(torch.float32) + base_G[:, None]) * scale_G[:, None]
    if there_GE is not None:
        x_GE = torch.where(there_GE, x_GE, 0.0)
    return x_GE.flatten()[:n].clone()


def _counts(there_GE: Tensor, n: int, bitmap: bool) -> Tensor:
    """How many codes each group has."""
    groups, group = there_GE.shape
    if bitmap:
        return there_GE.sum(1)
    counts = torch.full((groups,), group, device=there_GE.device)
    counts[-1] = n - (groups - 1) * group
    return counts


def _used(rows_GB: Tensor, counts_G: Tensor, bits: int) -> Tensor:
    """Which bytes of the rows hold codes."""
    return torch.arange(rows_GB.shape[1], device=rows_GB.device) < ((counts_G * bits + 7) // 8)[:, None]
