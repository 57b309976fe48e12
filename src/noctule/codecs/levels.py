"""Signed levels side by side, and a scale for each bucket: what QSGD, TernGrad and natural dithering have in common."""

from collections.abc import Callable

import torch
from torch import Tensor

from noctule.codecs.reference import nbytes
from noctule.codecs.steps import buckets, code_for, draw_seed, flat, room
from noctule.core.codec import Layout, Payload


def encode_levels(
    x: Tensor,
    levels: int,
    bucket: int,
    norm: float,
    rounded: Callable[[Tensor, Tensor], Tensor],
    generator: torch.Generator | None,
) -> Payload:
    """The payload of ``x``: scales, and levels from -levels to levels.

    Args:
        x: any shape.
        levels: the highest one.
        bucket: elements that share a scale.
        norm: p of the scale, the p-norm of a bucket; NaN where it is not finite.
        rounded: from magnitudes as shares of the scale and random numbers, both (buckets, bucket), to levels as floats; may
            change both.
        generator: of the seed.
    """
    x_N = flat(x)
    shares_CB, shares_N = room(x_N.numel(), bucket, x.device)
    torch.abs(x_N, out=shares_N)
    scales = bucket_norms(shares_CB, norm)
    finite = scales.isfinite()
    if not bool(finite.all()):
        scales = torch.where(finite, scales, torch.nan)
        shares_CB[~finite] = 0.0
    shares_CB.div_(torch.where(scales > 0.0, scales, 1.0)[:, None])
    u_CB = code_for(x.device).uniforms(draw_seed(generator), shares_CB.numel(), bucket, x.device).view_as(shares_CB)
    levels_N = rounded(shares_CB, u_CB).flatten()[: x_N.numel()]
    codes_N = levels_N.clamp_(max=levels).copysign_(x_N).add_(levels).to(torch.uint8)
    return Payload((scales, pack_codes(codes_N, bits_of(levels))), tuple(x.shape), x.dtype)


def decode_levels(payload: Payload, levels: int, bucket: int, magnitudes: Tensor) -> Tensor:
    """The tensor again.

    Args:
        payload: from `encode_levels`.
        levels: the highest one.
        bucket: elements that share a scale.
        magnitudes: (levels + 1,) float32: what each level means, as a share of the scale.
    """
    scales, packed = payload.parts
    n = torch.Size(payload.shape).numel()
    codes_N = unpack_codes(packed, n, bits_of(levels))
    shares = torch.cat([-magnitudes.flip(0)[:-1], magnitudes]).to(packed.device)
    if int(codes_N.max() if n else 0) > 2 * levels:
        raise ValueError(f"the wire is torn: level {int(codes_N.max())} of {2 * levels + 1}")
    x_CB, x_N = room(n, bucket, packed.device)
    torch.index_select(shares, 0, codes_N.to(torch.int32), out=x_N)
    x_CB.mul_(scales[:, None])
    return x_N.to(payload.dtype).view(payload.shape)


def bucket_norms(magnitudes_CB: Tensor, p: float) -> Tensor:
    """The p-norms of the buckets, added up in float64, where neither large nor small numbers leave the range.

    torch may share out the sum of a bucket of more than 32,768 elements, so that its last bit depends on threads.
    """
    if p == torch.inf:
        return magnitudes_CB.amax(1) if magnitudes_CB.numel() else magnitudes_CB.new_zeros(0)
    if p == 1.0:
        return magnitudes_CB.sum(1, dtype=torch.float64).to(torch.float32)
    return torch.linalg.vector_norm(magnitudes_CB, p, dim=1, dtype=torch.float64).to(torch.float32)


def layout_levels(n: int, levels: int, bucket: int) -> Layout:
    """Scales and levels."""
    return (torch.float32, buckets(n, bucket)), (torch.uint8, nbytes(n, bits_of(levels)))


def check_levels(levels: int, most: int) -> None:
    """Refuse a number of levels that there cannot be."""
    if not 1 <= levels <= most:
        raise ValueError(f"levels must be from 1 to {most}, got {levels}")


def bits_of(levels: int) -> int:
    """Bits that the levels from -levels to levels need."""
    return (2 * levels).bit_length()


def pack_codes(codes_N: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits side by side."""
    return codes_N if bits == 8 else code_for(codes_N.device).pack_bits(codes_N, bits)


def unpack_codes(packed: Tensor, n: int, bits: int) -> Tensor:
    """The codes (N,) again."""
    return packed if bits == 8 else code_for(packed.device).unpack_bits(packed, n, bits)
