"""Whole numbers of 8 or 4 bits between the smallest and the largest of a group."""

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from noctule.codecs.levels import pack_codes, unpack_codes
from noctule.codecs.reference import nbytes
from noctule.codecs.steps import buckets, check_bucket, code_for, draw_seed, flat, room
from noctule.core.codec import Layout, Payload

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
        whole_GE, whole_N = room(x_N.numel(), self.group, x.device)
        whole_N.copy_(x_N)
        whole_GE.view(-1)[x_N.numel() :] = x_N[-1:]  # which changes neither end of the range
        low, high = (whole_GE.amin(1), whole_GE.amax(1)) if x_N.numel() else (x_N, x_N)
        steps = ((high - low) / top).clamp(min=_SMALLEST)
        finite = steps.isfinite()
        if not bool(finite.all()):
            low, steps = torch.where(finite, low, torch.nan), torch.where(finite, steps, torch.nan)
            whole_GE[~finite] = 0.0
        whole_GE.sub_(low.nan_to_num()[:, None]).div_(steps.nan_to_num(1.0)[:, None])
        if self.stochastic:
            u_N = code_for(x.device).uniforms(draw_seed(generator), x_N.numel(), self.group, x.device)
            whole_N.add_(u_N).floor_()
        else:
            whole_N.round_()
        codes_N = whole_N.clamp_(max=top).to(torch.uint8)
        return Payload(
            (torch.stack([low, steps], 1).flatten(), pack_codes(codes_N, self.bits)), tuple(x.shape), x.dtype
        )

    def decode(self, payload: Payload) -> Tensor:
        """Offsets and whole steps."""
        pairs, packed = payload.parts
        n = math.prod(payload.shape)
        low, steps = pairs.view(-1, 2).unbind(1)
        x_GE, x_N = room(n, self.group, packed.device)
        x_N.copy_(unpack_codes(packed, n, self.bits))
        x_GE.mul_(steps[:, None]).add_(low[:, None])
        return x_N.to(payload.dtype).view(payload.shape)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Pairs of offset and step, and codes."""
        n = math.prod(shape)
        return (torch.float32, 2 * buckets(n, self.group)), (torch.uint8, nbytes(n, self.bits))
