"""Random generators whose seeds are derived from what makes a draw different from any other."""

from hashlib import blake2b

import torch


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator for these parts, such as a seed, a rank and a step; other parts, or another order of them, draw otherwise.

    >>> one, other = generator(0, "worker", 1), generator(0, "worker", 2)
    >>> torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=other))
    False
    """
    digest = blake2b(" ".join(map(str, parts)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))
