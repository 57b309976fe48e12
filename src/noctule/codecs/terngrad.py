"""Minus one, zero or one times the largest magnitude of a bucket.

Wen, Xu, Yan, Wu, Wang, Chen, Li: TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning, 2017
(arXiv 1705.07878).

Differs from the paper: 2 bits for each element, where log2(3) would do; nothing is clipped (a Stage that clips can stand before
it), and a scale belongs to a bucket rather than to a layer.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from noctule.codecs.levels import decode_levels, encode_levels, layout_levels
from noctule.codecs.steps import check_bucket
from noctule.core.codec import Layout, Payload


@dataclass(frozen=True)
class TernGrad:
    """Rounds to zero or the bucket's largest magnitude by chance, so that the mean is the number.

    A bucket with inf or NaN decodes to NaN.

    Args:
        bucket: elements that share a scale, of 4 bytes.

    >>> TernGrad().encode(torch.zeros(1024)).nbytes
    264
    """

    bucket: int = 512
    unbiased: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_bucket(self.bucket)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """Scales and signs."""
        return encode_levels(x, 1, self.bucket, math.inf, lambda shares, u: shares.add_(u).floor_(), generator)

    def decode(self, payload: Payload) -> Tensor:
        """The scale, its negative and zeros."""
        return decode_levels(payload, 1, self.bucket, torch.tensor([0.0, 1.0]))

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Scales and signs."""
        return layout_levels(math.prod(shape), 1, self.bucket)
