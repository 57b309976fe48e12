"""Augmentation of images: shift, flip and cutout, plain functions of a batch and a generator.

Each returns a new batch; the same generator gives the same batch. They chain as functions do:

>>> def augment(images, generator):
...     return cutout(flip(shift(images, generator, pixels=2), generator), generator, size=3)
>>> augment(torch.ones(5, 8, 8), torch.Generator().manual_seed(0)).shape
torch.Size([5, 8, 8])

Shapes: B images of height H and width W, (B, ..., H, W), with channels between or not.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Function of a batch and a random generator that returns a batch of the same shape."""


def shift(images: Tensor, generator: torch.Generator, *, pixels: int = 2) -> Tensor:
    """Move each image by up to so many pixels down or up and right or left, and fill with zeros."""
    if pixels < 0:
        raise ValueError(f"images are shifted by at least 0 pixels, got {pixels}")
    high, wide = _size(images)
    down, right = _draw(2 * pixels + 1, (2, len(images)), images, generator)
    windows = F.pad(images, (pixels, pixels, pixels, pixels)).unfold(-2, high, 1).unfold(-2, wide, 1)
    return windows[torch.arange(len(images), device=images.device), ..., down, right, :, :]


def flip(images: Tensor, generator: torch.Generator, *, chance: float = 0.5) -> Tensor:
    """Mirror each image, left for right, with this probability."""
    if not 0.0 <= chance <= 1.0:
        raise ValueError(f"a chance lies in [0, 1], got {chance}")
    _size(images)
    mirrored = torch.rand(len(images), generator=generator, device=generator.device).to(images.device) < chance
    return torch.where(_beside(mirrored, images), images.flip(-1), images)


def cutout(images: Tensor, generator: torch.Generator, *, size: int) -> Tensor:
    """Set a square to zero whose centre is a random pixel of each image; near the border a part of it lies outside.

    DeVries, Taylor 2017, arXiv 1708.04552. Differs from the authors' code: a square of odd size is not one pixel smaller.
    """
    if size < 0:
        raise ValueError(f"the side of a square is at least 0 pixels, got {size}")
    high, wide = _size(images)
    inside_BH, inside_BW = (_stretch(images, generator, side, size) for side in (high, wide))
    return images.masked_fill(_beside(inside_BH[:, :, None] & inside_BW[:, None, :], images), 0)


def _size(images: Tensor) -> tuple[int, int]:
    if images.dim() < 3:
        raise ValueError(f"expected images, (B, ..., H, W), got shape {tuple(images.shape)}")
    return images.shape[-2], images.shape[-1]


def _draw(below: int, shape: tuple[int, ...], images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(below, shape, generator=generator, device=generator.device).to(images.device)


def _stretch(images: Tensor, generator: torch.Generator, side: int, size: int) -> Tensor:
    """Which of ``side`` pixels lie in a stretch of ``size`` round a random one, (B, side)."""
    first = _draw(side, (len(images), 1), images, generator) - size // 2
    at = torch.arange(side, device=images.device)
    return (at >= first) & (at < first + size)


def _beside(mask: Tensor, images: Tensor) -> Tensor:
    """A mask of (B,) or (B, H, W) with dimensions of size one added, so that it broadcasts over channels."""
    return mask.view(len(mask), *[1] * (images.dim() - mask.dim()), *mask.shape[1:])
