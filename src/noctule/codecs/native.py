"""The elementary steps, compiled, for tensors on the CPU; the same bits as `noctule.codecs.reference`."""

import torch
from torch import Tensor

from noctule.codecs.reference import nbytes
from noctule.kernels.native import _native

PARALLEL_FROM = 1 << 17
"""Elements under which a second thread costs more than it gives."""


def natural_encode(x_N: Tensor, bucket: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes (N,) of sign and 7 bits, and the floor of each bucket: the magnitude is 2^(floor + code - 127), or zero."""
    n = _check(x_N, torch.float32)
    codes, floors = _bytes(n), _bytes(-(-n // bucket))
    _native.natural_encode(x_N.data_ptr(), n, bucket, seed, codes.data_ptr(), floors.data_ptr(), _threads(n))
    return codes, floors


def natural_decode(codes_N: Tensor, floors: Tensor, bucket: int) -> Tensor:
    """float32 (N,); NaN in buckets whose floor is 255."""
    n = _check(codes_N, torch.uint8)
    _check(floors, torch.uint8, -(-n // bucket))
    x_N = torch.empty(n, dtype=torch.float32, device="cpu")
    _native.natural_decode(codes_N.data_ptr(), floors.data_ptr(), n, bucket, x_N.data_ptr(), _threads(n))
    return x_N


def uniforms(seed: int, n: int, bucket: int, device: torch.device) -> Tensor:
    """Numbers (N,) in [0, 1), of 24 bits each."""
    u_N = torch.empty(n, dtype=torch.float32, device=device)
    _native.uniforms(seed, n, bucket, u_N.data_ptr(), _threads(n))
    return u_N


def pack_bits(codes_N: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits side by side in ceil(N * bits / 8) bytes, the first in the lowest bits."""
    n = _check(codes_N, torch.uint8)
    packed = _bytes(nbytes(n, bits))
    _native.pack_bits(codes_N.data_ptr(), n, bits, packed.data_ptr(), _threads(n))
    return packed


def unpack_bits(packed: Tensor, n: int, bits: int) -> Tensor:
    """The codes (N,) again."""
    _check(packed, torch.uint8, nbytes(n, bits))
    codes_N = _bytes(n)
    _native.unpack_bits(packed.data_ptr(), n, bits, codes_N.data_ptr(), _threads(n))
    return codes_N


def largest(x_N: Tensor, k: int) -> Tensor:
    """The positions (K,) of the largest magnitudes (NaN above inf), of equal ones the first; in ascending order."""
    n = _check(x_N, torch.float32)
    if not 0 <= k <= n:
        raise ValueError(f"there are no {k} largest of {n} elements")
    positions_K = torch.empty(k, dtype=torch.int64, device="cpu")
    _native.largest(x_N.data_ptr(), n, k, positions_K.data_ptr(), _threads(n))
    return positions_K


def _check(x: Tensor, dtype: torch.dtype, numel: int | None = None) -> int:
    """Refuse what raw addresses would misread; returns the number of elements."""
    if x.dtype is not dtype or not x.is_cpu or not x.is_contiguous() or numel not in (None, x.numel()):
        wanted = "elements" if numel is None else numel
        raise ValueError(f"expected {wanted} {dtype} side by side on the CPU, got {x.numel()} {x.dtype} on {x.device}")
    return x.numel()


def _bytes(n: int) -> Tensor:
    return torch.empty(n, dtype=torch.uint8, device="cpu")


def _threads(n: int) -> int:
    return torch.get_num_threads() if n >= PARALLEL_FROM else 1
