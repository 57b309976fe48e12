"""What codecs are made of: a flat float32 tensor, a seed, and the elementary steps in the fastest code that can do them."""

import torch
from torch import Tensor

from noctule.codecs import native, reference
from noctule.kernels.native import available


def code_for(device: torch.device):
    """The module that has the elementary steps for tensors on this device."""
    return native if device.type == "cpu" and available() else reference


def flat(x: Tensor) -> Tensor:
    """``x`` as contiguous float32 (N,), where the codecs do their arithmetic; float64 is rounded."""
    return x.detach().to(torch.float32).reshape(-1).contiguous()


def room(n: int, bucket: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the buckets of n elements, (buckets, bucket) and a view (N,); what fills up the last bucket is zero.

    A bucket longer than the tensor is as long as the tensor.
    """
    bucket = min(bucket, max(n, 1))
    whole = torch.empty(buckets(n, bucket) * bucket, dtype=torch.float32, device=device)
    whole[n:] = 0.0
    return whole.view(-1, bucket), whole[:n]


def draw_seed(generator: torch.Generator | None) -> int:
    """63 random bits, all that a codec draws for one tensor."""
    return int(torch.randint(0, 2**63 - 1, (), generator=generator, device="cpu"))


def check_bucket(bucket: int, what: str = "bucket") -> None:
    """Refuse a bucket that has no element, or more than positions are counted for."""
    if not 1 <= bucket < 2**31:
        raise ValueError(f"{what} must be from 1 to 2^31 - 1 elements, got {bucket}")


def buckets(n: int, bucket: int) -> int:
    """How many buckets there are."""
    return -(-n // bucket)


def check_fraction(fraction: float) -> None:
    """Refuse what is no share of the elements."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")


def share(fraction: float, n: int) -> int:
    """That fraction of n elements, rounded; one at least where there are any."""
    return min(n, max(1, round(fraction * n)))
