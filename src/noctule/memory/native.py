"""The elementary steps, compiled, for tensors on the CPU; the same bits as `noctule.memory.reference`."""

import torch
from torch import Tensor

from noctule.kernels.native import _native

PARALLEL_FROM = 1 << 17
"""Elements under which a second thread costs more than it gives."""


def ranges(x_N: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest and highest element of each group (NaN where one is not finite), and how many are not zero: int32."""
    n = x_N.numel()
    groups = -(-n // group)
    low, high = x_N.new_empty(2, groups)
    nonzeros = torch.empty(groups, dtype=torch.int32, device="cpu")
    _native.saved_ranges(_address(x_N), n, group, low.data_ptr(), high.data_ptr(), nonzeros.data_ptr(), _threads(n))
    return low, high, nonzeros


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
    """Codes side by side, those of a group from its offset in bytes on, and the bitmap."""
    n = x_N.numel()
    codes = torch.empty(nbytes_codes, dtype=torch.uint8, device="cpu")
    mask = None
    if bitmap:
        mask = torch.empty(len(inverse_G), group // 8, dtype=torch.uint8, device="cpu")
        mask[-1] = 0  # of which the last group fills a part
    _native.saved_encode(
        _address(x_N),
        n,
        group,
        _address(inverse_G),
        _address(base_G),
        bits,
        _address(offsets_G, torch.int64),
        0 if mask is None else mask.data_ptr(),
        codes.data_ptr(),
        _threads(n),
    )
    return codes, None if mask is None else mask.flatten()


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
    x_N = torch.empty(n, dtype=torch.float32, device="cpu")
    _native.saved_decode(
        _address(codes, torch.uint8),
        n,
        group,
        _address(scale_G),
        _address(base_G),
        bits,
        _address(offsets_G, torch.int64),
        0 if mask is None else _address(mask, torch.uint8),
        x_N.data_ptr(),
        _threads(n),
    )
    return x_N


def _address(x: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Refuse what raw addresses would misread."""
    if x.dtype is not dtype or not x.is_cpu or not x.is_contiguous():
        raise ValueError(f"expected contiguous {dtype} on the CPU, got {x.dtype} on {x.device}")
    return x.data_ptr()


def _threads(n: int) -> int:
    return torch.get_num_threads() if n >= PARALLEL_FROM else 1
