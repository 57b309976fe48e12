"""A small vision transformer.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv 2010.11929. Differs from the paper: the tokens are averaged instead
of asking a class token, as Beyer, Zhai, Kolesnikov 2022, arXiv 2205.01580, found as good.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noctule.models.checks import check_image_model


class ViT(nn.Module):
    """Patches of an image as tokens, pre-normalised blocks of attention and a GELU network, and a linear layer on their mean.

    Args:
        shape: (C, H, W) of an image; inputs are flat, (B, C H W).
        classes: numbers out.
        patch: pixels of a patch's side, which divides the image's sides.
        width: of the residual stream.
        depth: blocks.
        heads: of each attention, which share the width.
        hidden: of the network of a block (default: four times the width).

    >>> ViT((1, 28, 28), 10, patch=7, width=32, depth=2, heads=4)(torch.rand(5, 784)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        patch: int = 4,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        check_image_model(shape, classes, patch=patch, width=width, depth=depth, heads=heads)
        if shape[1] % patch or shape[2] % patch or width % heads:
            raise ValueError(
                f"patches of {patch} x {patch} must divide the image of {shape[1]} x {shape[2]} pixels, and heads ({heads}) the "
                f"width ({width})"
            )
        self.pixels = nn.Unflatten(1, shape)
        self.patches = nn.Conv2d(shape[0], width, patch, stride=patch)
        tokens = (shape[1] // patch) * (shape[2] // patch)
        self.positions = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(ViTBlock(width, heads, hidden or 4 * width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C H W) -> (B, classes)."""
        tokens = self.patches(self.pixels(x)).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class ViTBlock(nn.Module):
    """Attention and then a network, each behind its norm and added to the residual stream."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads, self.head_width = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, W) -> (B, T, W)."""
        y = self.norm1(x)
        q, k, v = (
            part(y).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.network(self.norm2(x))
