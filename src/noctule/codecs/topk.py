"""The largest elements alone.

Aji, Heafield: Sparse Communication for Distributed Gradient Descent, 2017 (arXiv 1704.05021).
"""

import math
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from noctule.codecs.steps import buckets, check_fraction, code_for, flat, share
from noctule.core.codec import Codec, Layout, Payload
from noctule.core.exact import Exact

BLOCK = 1 << 16
"""Elements whose offsets fit in 16 bits."""


@dataclass(frozen=True)
class TopK:
    """Keeps the largest magnitudes, and zeros elsewhere: biased, so it wants error feedback.

    A position is 16 bits within its block of 65,536, with a count of 4 bytes for each block. Of equal magnitudes the first are
    kept, so that equal tensors give equal bytes. NaN is larger than inf, and both than any number: as many as fit are sent.
    Magnitudes are compared in float32.

    Args:
        fraction: of the elements.
        at_least: elements of each tensor, all where it has fewer: of biases and last layers a small fraction is too few to train.
        values: a codec for what is kept (default: exact, in its own dtype).

    >>> codec = TopK(0.5)
    >>> codec.decode(codec.encode(torch.tensor([1.0, -3.0, 2.0, 0.5]))).tolist()
    [0.0, -3.0, 2.0, 0.0]
    """

    fraction: float
    _: KW_ONLY
    at_least: int = 1
    values: Codec | None = None
    unbiased: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        if self.at_least < 1:
            raise ValueError(f"at least one element of a tensor is kept, got at_least={self.at_least}")

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """Counts, offsets, and the values in the order of their positions."""
        k = self._kept(x.numel())
        positions_K = code_for(x.device).largest(flat(x), k)
        kept = self._values.encode(x.detach().reshape(-1)[positions_K], generator)
        edges = torch.arange(buckets(x.numel(), BLOCK) + 1, device=x.device) * BLOCK
        counts = torch.searchsorted(positions_K, edges).diff().to(torch.int32)
        offsets = (positions_K & (BLOCK - 1)).to(torch.uint16)
        return Payload((counts, offsets, *kept.parts), tuple(x.shape), x.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """What was kept, and zeros.

        Raises:
            ValueError: the positions cannot be: the wire is torn.
        """
        counts, offsets, *parts = payload.parts
        n, k = math.prod(payload.shape), offsets.numel()
        if bool((counts < 0).any()) or int(counts.sum(dtype=torch.int64)) != k:
            raise ValueError(
                f"the wire is torn: the blocks count {int(counts.sum(dtype=torch.int64))} positions, not {k}"
            )
        blocks = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts, output_size=k)
        positions_K = blocks * BLOCK + offsets.to(torch.int64)
        if k and int(positions_K.max()) >= n:
            raise ValueError(f"the wire is torn: position {int(positions_K.max())} of a tensor of {n} elements")
        x_N = torch.zeros(n, dtype=payload.dtype, device=counts.device)
        x_N[positions_K] = self._values.decode(Payload(tuple(parts), (k,), payload.dtype))
        return x_N.view(payload.shape)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Counts, offsets, and the parts of the values' codec."""
        n = math.prod(shape)
        k = self._kept(n)
        return (torch.int32, buckets(n, BLOCK)), (torch.uint16, k), *self._values.layout((k,), dtype)

    def _kept(self, n: int) -> int:
        return max(share(self.fraction, n), min(self.at_least, n))

    @property
    def _values(self) -> Codec:
        return self.values or Exact()
