"""One bit for each element.

Seide, Fu, Droppo, Li, Yu: 1-Bit Stochastic Gradient Descent, Interspeech 2014; Bernstein, Wang, Azizzadenesheli, Anandkumar:
signSGD, 2018 (arXiv 1802.04434); Karimireddy, Rebjock, Stich, Jaggi: Error Feedback Fixes SignSGD, 2019 (arXiv 1901.09847).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from noctule.codecs.levels import pack_codes, unpack_codes
from noctule.codecs.reference import nbytes
from noctule.codecs.steps import buckets, check_bucket, flat, room
from noctule.core.codec import Layout, Payload


@dataclass(frozen=True)
class SignSGD:
    """The sign, times the mean magnitude of the bucket: biased, so it wants error feedback.

    Zeros take the positive sign; a bucket of zeros alone stays zero, and one with inf or NaN decodes to NaN.

    Args:
        bucket: elements that share a magnitude, of 4 bytes.

    >>> codec = SignSGD()
    >>> codec.decode(codec.encode(torch.tensor([1.0, -3.0, 2.0]))).tolist()
    [2.0, -2.0, 2.0]
    """

    bucket: int = 512
    unbiased: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_bucket(self.bucket)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """Magnitudes and signs."""
        x_N = flat(x)
        absolute_CB, absolute_N = room(x_N.numel(), self.bucket, x.device)
        torch.abs(x_N, out=absolute_N)
        sums = absolute_CB.sum(1, dtype=torch.float64)
        counts = torch.full_like(sums, self.bucket)
        counts[-1:] -= -x_N.numel() % self.bucket
        scales = (sums / counts).to(torch.float32)
        scales = torch.where(scales.isfinite(), scales, torch.nan)
        return Payload((scales, pack_codes((x_N < 0.0).view(torch.uint8), 1)), tuple(x.shape), x.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """The magnitude and its negative."""
        scales, packed = payload.parts
        n = math.prod(payload.shape)
        x_CB, x_N = room(n, self.bucket, packed.device)
        x_N.copy_(unpack_codes(packed, n, 1))
        x_CB.mul_(-2.0).add_(1.0).mul_(scales[:, None])
        return x_N.to(payload.dtype).view(payload.shape)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Magnitudes and signs."""
        n = math.prod(shape)
        return (torch.float32, buckets(n, self.bucket)), (torch.uint8, nbytes(n, 1))
