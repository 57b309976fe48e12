"""Workers that are threads, and a codec that leaves much out."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from noctule.codecs import Payload
from noctule.exchange import Local


def together(world: int, work: Callable[[Local], Any], *, timeout_seconds: float = 20.0) -> list[Any]:
    """What each of so many workers returns."""
    paths = Local.together(world, timeout_seconds=timeout_seconds)
    with ThreadPoolExecutor(world) as threads:
        return [done.result() for done in [threads.submit(work, path) for path in paths]]


@dataclass(frozen=True)
class Half:
    """Sends the first half of a tensor only: as biased as can be."""

    unbiased: bool = False

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        return Payload((x.flatten()[: (x.numel() + 1) // 2].clone(),), tuple(x.shape), x.dtype)

    def decode(self, payload: Payload) -> Tensor:
        flat = torch.zeros(torch.Size(payload.shape).numel(), dtype=payload.dtype)
        flat[: payload.parts[0].numel()] = payload.parts[0]
        return flat.view(payload.shape)

    def layout(self, shape, dtype):
        return ((dtype, (torch.Size(shape).numel() + 1) // 2),)


def given(rank: int, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """A few tensors, other ones on every worker."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return [scale * torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (), (0,), (7, 2))]


KEYS = ["a.weight", "a.bias", "scale", "empty", "b.weight"]
