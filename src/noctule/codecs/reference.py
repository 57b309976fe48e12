"""The elementary steps in plain torch: the oracle of the tests, and what runs on CUDA and where the compiled module is missing.

Tensors are flat: N elements in buckets of so many, the last one shorter. Random words are those of `noctule.kernels`, one hash for
each (seed, bucket, position).
"""

import torch
from torch import Tensor

from noctule.kernels.reference import random_words

_MAGNITUDE, _MANTISSA, _INFINITE = 0x7FFFFFFF, 0x007FFFFF, 255


def natural_encode(x_N: Tensor, bucket: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes (N,) of sign and 7 bits, and the floor of each bucket: the magnitude is 2^(floor + code - 127), or zero.

    A float is its exponent's field and the mantissa below it: adding 23 random bits carries into the field with just the chance
    that rounds up without bias. Below the smallest code, the share of that code takes the place of the mantissa.
    """
    bucket = _no_longer(bucket, x_N.numel())
    bits = in_buckets(x_N.view(torch.int32), bucket).to(torch.int64)
    a, up = bits & _MAGNITUDE, _words(seed, x_N.numel(), bucket, x_N.device) >> 9
    largest = a.amax(1, keepdim=True) >> 23
    floor = (largest - 126).clamp(min=0)
    e = a >> 23
    whole, shift = a & _MANTISSA | (e > 0).to(torch.int64) << 23, floor + 1 - e.clamp(min=1)
    below = (floor << 23) + (whole >> shift.clamp(0, 31))
    codes = (torch.where(e > floor, a, below) + up >> 23) - floor | bits >> 24 & 0x80
    infinite = largest == _INFINITE
    codes, floor = torch.where(infinite, 0, codes), torch.where(infinite, _INFINITE, floor)
    return codes.to(torch.uint8).flatten()[: x_N.numel()], floor.to(torch.uint8).flatten()


def natural_decode(codes_N: Tensor, floors: Tensor, bucket: int) -> Tensor:
    """float32 (N,); NaN in buckets whose floor is 255."""
    bucket = _no_longer(bucket, codes_N.numel())
    codes, floor = in_buckets(codes_N, bucket).to(torch.int32), floors.to(torch.int32)[:, None]
    field = codes & 0x7F
    bits = torch.where(field > 0, field + floor, 0) << 23 | (codes & 0x80) << 24
    x = torch.where(floor == _INFINITE, torch.nan, bits.view(torch.float32))
    return x.flatten()[: codes_N.numel()]


def uniforms(seed: int, n: int, bucket: int, device: torch.device) -> Tensor:
    """Numbers (N,) in [0, 1), of 24 bits each."""
    return (_words(seed, n, bucket, device) >> 8).to(torch.float32).flatten()[:n] * 2.0**-24


def pack_bits(codes_N: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits side by side in ceil(N * bits / 8) bytes, the first in the lowest bits."""
    steps = torch.arange(8, device=codes_N.device)
    words = (in_buckets(codes_N, 8).to(torch.int64) << bits * steps).sum(1, keepdim=True)
    return (words >> 8 * steps[:bits]).to(torch.uint8).flatten()[: nbytes(codes_N.numel(), bits)]


def unpack_bits(packed: Tensor, n: int, bits: int) -> Tensor:
    """The codes (N,) again."""
    steps = torch.arange(8, device=packed.device)
    words = (in_buckets(packed, bits).to(torch.int64) << 8 * steps[:bits]).sum(1, keepdim=True)
    return (words >> bits * steps & (1 << bits) - 1).to(torch.uint8).flatten()[:n]


def largest(x_N: Tensor, k: int) -> Tensor:
    """The positions (K,) of the largest magnitudes (NaN above inf), of equal ones the first; in ascending order."""
    key = x_N.view(torch.int32) & _MAGNITUDE
    bound = key.topk(k).values[-1:]
    above, equal = key > bound, key == bound
    return (above | equal & (equal.cumsum(0) <= k - above.sum())).nonzero().flatten()


def in_buckets(x_N: Tensor, bucket: int) -> Tensor:
    """``x`` as (buckets, bucket), the last one filled up with zeros."""
    missing = -x_N.numel() % bucket
    return (torch.nn.functional.pad(x_N, (0, missing)) if missing else x_N).view(-1, bucket)


def nbytes(n: int, bits: int) -> int:
    """Bytes of so many codes side by side."""
    return (n * bits + 7) // 8


def _words(seed: int, n: int, bucket: int, device: torch.device) -> Tensor:
    bucket = _no_longer(bucket, n)
    return random_words(seed, -(-n // bucket), bucket, device=device)


def _no_longer(bucket: int, n: int) -> int:
    return min(bucket, max(n, 1))
