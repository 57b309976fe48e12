"""Powers of two below the norm of a bucket, rounded by chance.

Horvath, Ho, Horvath, Sahu, Canini, Richtarik: Natural Compression for Distributed Deep Learning, 2022 (arXiv 1905.10988).

Differs from the paper: a norm belongs to a bucket rather than to a tensor, and zero has one code instead of two.
"""

import math
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from noctule.codecs.levels import check_levels, decode_levels, encode_levels, layout_levels
from noctule.codecs.steps import check_bucket
from noctule.core.codec import Layout, Payload


@dataclass(frozen=True)
class NaturalDithering:
    """Rounds to norm times 1, 1/2, ... 2^(1 - levels) or 0 by chance, so that the mean is the number.

    The variance is at most 1/8 + a min(1, a) times the squared norm, where a = d^(1/min(p, 2)) 2^(1 - levels) and d the elements of
    a bucket: as small as with 2^(levels - 1) even levels. A bucket whose norm is not finite decodes to NaN.

    Args:
        levels: up to 127; 1, 3, 7 ... 127 use their bits best.
        p: of the norm, at least 1; inf is the largest magnitude.
        bucket: elements that share a norm, of 4 bytes.

    >>> codec = NaturalDithering(3)
    >>> codec.decode(codec.encode(torch.tensor([0.0, 0.75, -1.5, 3.0]))).tolist()
    [0.0, 0.75, -1.5, 3.0]
    """

    levels: int = 7
    _: KW_ONLY
    p: float = math.inf
    bucket: int = 512
    unbiased: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_levels(self.levels, 127)
        if not self.p >= 1.0:
            raise ValueError(f"p must be at least 1, got {self.p}")
        check_bucket(self.bucket)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """Norms and levels."""
        return encode_levels(x, self.levels, self.bucket, self.p, self._rounded, generator)

    def decode(self, payload: Payload) -> Tensor:
        """Powers of two times the norm."""
        powers = 2.0 ** torch.arange(1 - self.levels, 1, dtype=torch.float32)
        return decode_levels(payload, self.levels, self.bucket, torch.cat([torch.zeros(1), powers]))

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Norms and levels."""
        return layout_levels(math.prod(shape), self.levels, self.bucket)

    def _rounded(self, shares: Tensor, u: Tensor) -> Tensor:
        """As in natural compression: random bits added to the mantissa carry into the exponent by the right chance.

        Below the lowest level, what lies between zero and it takes the place of what lies between its half and it.
        """
        lowest = 2.0 ** (1 - self.levels)
        shares = torch.maximum(shares, shares.add(lowest).mul_(0.5), out=shares)
        fields = shares.view(torch.int32).add_(u.mul_(2.0**23).to(torch.int32)).bitwise_right_shift_(23)
        return fields.sub_(127 - self.levels).to(torch.float32)
