"""Two thin factors in place of a matrix.

Vogels, Karimireddy, Jaggi: PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization, 2019 (arXiv 1905.13727).

Differs from the paper: a codec sends both factors of one tensor and keeps nothing from one call to the next, so it begins anew from
random directions and iterates more than once.
"""

import math
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from noctule.codecs.steps import draw_seed, flat
from noctule.core.codec import Layout, Payload
from noctule.core.finite import all_finite


@dataclass(frozen=True)
class LowRank:
    """The best P Q^T of a rank that a few power iterations find: biased, so it wants error feedback.

    A tensor is taken as a matrix of its first dimension by all others. Vectors, and matrices that the factors would not make
    smaller, go as they are. A matrix with inf or NaN decodes to NaN everywhere. Decoding gives the same bits on every machine;
    encoding multiplies matrices, so its last bits may depend on threads and processor.

    Args:
        rank: columns of the factors, which are float32.
        iterations: the more, the closer to the singular vectors.

    >>> codec, x = LowRank(1), torch.arange(1.0, 5.0).outer(torch.arange(3.0))
    >>> torch.allclose(codec.decode(codec.encode(x)), x)
    True
    """

    rank: int = 4
    _: KW_ONLY
    iterations: int = 2
    unbiased: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.rank < 1 or self.iterations < 1:
            raise ValueError(f"rank and iterations must be at least 1, got {self.rank} and {self.iterations}")

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """The factors, or the tensor itself."""
        if not self._factors(tuple(x.shape), x.dtype):
            return Payload((x.detach().reshape(-1).contiguous(),), tuple(x.shape), x.dtype)
        a_MN = flat(x).view(x.shape[0], -1)
        start = torch.Generator().manual_seed(draw_seed(generator))
        q_NR = torch.randn(a_MN.shape[1], self.rank, generator=start, device="cpu").to(x.device)
        if not all_finite(a_MN):  # which would raise in the factorisation
            p_MR, q_NR = (torch.full((size, self.rank), torch.nan, device=x.device) for size in a_MN.shape)
        else:
            for _ in range(self.iterations):
                # thin factors from the left: several times as fast as from the right
                p_MR = torch.linalg.qr((q_NR.t() @ a_MN.t()).t()).Q
                q_NR = (p_MR.t() @ a_MN).t()
        return Payload((p_MR.flatten(), q_NR.flatten()), tuple(x.shape), x.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """The product of the factors."""
        if len(payload.parts) == 1:
            return payload.parts[0].view(payload.shape)
        p_MR, q_NR = (part.view(-1, self.rank) for part in payload.parts)
        x_MN = p_MR[:, :1] * q_NR[:, 0]
        term_MN = torch.empty_like(x_MN)
        for r in range(1, self.rank):  # one rounding for each product and each sum, so that all machines agree on them
            x_MN += torch.mul(p_MR[:, r : r + 1], q_NR[:, r], out=term_MN)
        return x_MN.to(payload.dtype).view(payload.shape)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """The factors, or the tensor itself."""
        if sizes := self._factors(shape, dtype):
            return tuple((torch.float32, size * self.rank) for size in sizes)
        return ((dtype, math.prod(shape)),)

    def _factors(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int] | None:
        """Rows of the factors, where they are worth it."""
        if len(shape) < 2:
            return None
        rows, columns = shape[0], math.prod(shape[1:])
        smaller = 4 * self.rank * (rows + columns) < dtype.itemsize * rows * columns and self.rank <= min(rows, columns)
        return (rows, columns) if smaller else None
