"""Even levels below the norm of a bucket, rounded by chance.

Alistarh, Grubic, Li, Tomioka, Vojnovic: QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding, 2017
(arXiv 1610.02132).

Differs from the paper: levels have a fixed number of bits, there is no Elias coding.
"""

import math
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from noctule.codecs.levels import check_levels, decode_levels, encode_levels, layout_levels
from noctule.codecs.steps import check_bucket
from noctule.core.codec import Layout, Payload


@dataclass(frozen=True)
class QSGD:
    """Rounds to multiples of norm / levels by chance, so that the mean is the number.

    The variance is at most min(d / levels^2, sqrt(d) / levels) times the squared norm, d the elements of a bucket. Costs
    log2(2 levels + 1) bits for each element, rounded up, and 4 bytes for each bucket. A bucket whose norm is not finite decodes
    to NaN.

    Args:
        levels: up to 127; 1, 3, 7 ... 127 use their bits best.
        bucket: elements that share a norm.

    >>> QSGD(7).encode(torch.zeros(1024)).nbytes
    520
    """

    levels: int = 7
    _: KW_ONLY
    bucket: int = 512
    unbiased: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_levels(self.levels, 127)
        check_bucket(self.bucket)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """Norms and levels."""
        return encode_levels(x, self.levels, self.bucket, 2, self._rounded, generator)

    def decode(self, payload: Payload) -> Tensor:
        """Multiples of norm / levels."""
        return decode_levels(payload, self.levels, self.bucket, torch.arange(self.levels + 1) / self.levels)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Norms and levels."""
        return layout_levels(math.prod(shape), self.levels, self.bucket)

    def _rounded(self, shares: Tensor, u: Tensor) -> Tensor:
        return shares.mul_(self.levels).add_(u).floor_()
