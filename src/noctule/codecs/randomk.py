"""Elements chosen by chance, their positions known from a seed.

Wangni, Wang, Liu, Zhang: Gradient Sparsification for Communication-Efficient Distributed Optimization, 2018 (arXiv 1710.09854);
Stich, Cordonnier, Jaggi: Sparsified SGD with Memory, 2018 (arXiv 1809.07599).
"""

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from noctule.codecs.steps import check_fraction, code_for, draw_seed, share
from noctule.core.codec import Codec, Layout, Payload
from noctule.core.exact import Exact
from noctule.core.finite import all_finite

_BUCKET, _LONG = 1 << 16, (1 << 63) - 1


@dataclass(frozen=True)
class RandomK:
    """Keeps elements chosen by chance, scaled by n/k so that the mean is right, and zeros elsewhere.

    Where the values' codec is biased there is no mean to keep right, and nothing is scaled: then what is left out is to be sent
    later, and of scaled numbers more would be left out than there was. The second moment is n/k times that of the tensor. Positions
    cost 8 bytes in all: both sides draw them from a seed. A tensor with inf or NaN anywhere decodes to NaN at all positions that
    were chosen.

    Args:
        fraction: of the elements, at least one.
        values: a codec for what is kept (default: exact, in its own dtype).

    >>> codec = RandomK(0.25)
    >>> codec.decode(codec.encode(torch.full((8,), 1.5))).sort().values.tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 6.0, 6.0]
    """

    fraction: float
    _: KW_ONLY
    values: Codec | None = None

    def __post_init__(self) -> None:
        check_fraction(self.fraction)

    @property
    def unbiased(self) -> bool:
        """If the values' codec is."""
        return self._values.unbiased

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """A seed, and the values in the order of their positions."""
        k, seed = share(self.fraction, x.numel()), draw_seed(generator)
        x_N = x.detach().reshape(-1)
        kept_K = x_N[_positions(seed, x_N.numel(), k, x.device)]
        if not all_finite(x_N):
            kept_K = torch.full_like(kept_K, torch.nan)
        kept = self._values.encode(kept_K, generator)
        return Payload((torch.tensor([seed], device=x.device), *kept.parts), tuple(x.shape), x.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """What was kept, times n/k where the mean is to be right, and zeros."""
        seed, *parts = payload.parts
        n = math.prod(payload.shape)
        k = share(self.fraction, n)
        kept_K = self._values.decode(Payload(tuple(parts), (k,), payload.dtype))
        x_N = torch.zeros(n, dtype=payload.dtype, device=seed.device)
        wide_K = kept_K.to(torch.promote_types(payload.dtype, torch.float32))
        scale = n / max(k, 1) if self.unbiased else 1.0
        x_N[_positions(int(seed) & _LONG, n, k, seed.device)] = (wide_K * scale).to(payload.dtype)
        return x_N.view(payload.shape)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """The seed, and the parts of the values' codec."""
        return (torch.int64, 1), *self._values.layout((share(self.fraction, math.prod(shape)),), dtype)

    @property
    def _values(self) -> Codec:
        return self.values or Exact()


def _positions(seed: int, n: int, k: int, device: torch.device) -> Tensor:
    """The places of the k smallest of n random numbers, ascending."""
    code = code_for(device)
    # the search is fastest over numbers of all magnitudes
    return code.largest(code.uniforms(seed, n, _BUCKET, device).reciprocal_(), k)
