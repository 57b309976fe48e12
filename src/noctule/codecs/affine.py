"""Whole numbers of 8 or 4 bits between the smallest and the largest of a group."""

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from noctule.codecs.base import Layout, Payload
from noctule.codecs.levels import pack_codes, unpack_codes
from noctule.codecs.reference import in_buckets, nbytes
from noctule.codecs.steps import buckets, check_bucket, code_for, draw_seed, flat

_SMALLEST = torch.finfo(torch.float32).smallest_normal


@dataclass(frozen=True)
class Affine:
    """Cuts the range of a group into 255 or 15 even steps: offset + step * code.

    Rounded to nearest an element is off by half a step at most; stochastic, by one, and the mean is right. A group that has inf
    or NaN, or a range beyond float32, decodes to NaN. Steps are never finer than the smallest normal float.

    Args:
        bits: 8 or 4.
        group: elements that share a step and an offset, of 4 bytes each.
        stochastic: round by chance.

    >>> codec = Affine()
    >>> codec.decode(codec.encode(torch.arange(256.0))).equal(torch.arange(256.0))
    True
    """

    bits: int = 8
    _: KW_ONLY
    group: int = 256
    stochastic: bool = False

    def __post_init__(self) -> None:
        """Refuses other bits and impossible groups."""
        if self.bits not in (4, 8):
            raise ValueError(f"Affine has 4 or 8 bits, got {self.bits}")
        check_bucket(self.group, "group")

    @property
    def unbiased(self) -> bool:
        """When stochastic."""
        return self.stochastic

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """Offsets, steps and codes."""
        x_N, top = flat(x), 2**self.bits - 1
        n = x_N.numel()
        missing = -n % self.group
        x_GE = (torch.cat([x_N, x_N[-1:].expand(missing)]) if missing else x_N).view(-1, self.group)
        low, high = (x_GE.amin(1), x_GE.amax(1)) if n else (x_N, x_N)
        steps = ((high - low) / top).clamp(min=_SMALLEST)
        finite = steps.isfinite()
        if not bool(finite.all()):
            low, steps = torch.where(finite, low, torch.nan), torch.where(finite, steps, torch.nan)
            x_GE = torch.where(finite[:, None], x_GE, 0.0)
        whole = x_GE.sub(torch.where(finite, low, 0.0)[:, None]).div_(torch.where(finite, steps, 1.0)[:, None])
        if self.stochastic:
            u_N = code_for(x.device).uniforms(draw_seed(generator), n, self.group, x.device)
            whole.add_(in_buckets(u_N, self.group)).floor_()
        else:
            whole.round_()
        codes_N = whole.clamp_(max=top).to(torch.uint8).flatten()[:n]
        return Payload(
            (torch.stack([low, steps], 1).flatten(), pack_codes(codes_N, self.bits)), tuple(x.shape), x.dtype
        )

    def decode(self, payload: Payload) -> Tensor:
        """Offsets and whole steps."""
        pairs, packed = payload.parts
        n = math.prod(payload.shape)
        low, steps = pairs.view(-1, 2).unbind(1)
        whole = in_buckets(unpack_codes(packed, n, self.bits), self.group).to(torch.float32)
        x_N = whole.mul_(steps[:, None]).add_(low[:, None]).flatten()[:n]
        return x_N.to(payload.dtype).view(payload.shape)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Pairs of offset and step, and codes."""
        n = math.prod(shape)
        return (torch.float32, 2 * buckets(n, self.group)), (torch.uint8, nbytes(n, self.bits))
