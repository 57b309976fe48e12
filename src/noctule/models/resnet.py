"""Residual networks.

He, Zhang, Ren, Sun 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385. Differs from the paper in the small
ones: where a stage halves the image, the shortcut is a 1x1 convolution with its norm (option B of the paper), as in the large ones.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noctule.models.checks import check_image_model


class ResNet(nn.Sequential):
    """A residual network on images; `resnet` makes one of a depth of the paper.

    Args:
        shape: (C, H, W) of an image; inputs are flat, (B, C H W).
        classes: numbers out.
        blocks: of each stage; each stage but the first halves the image and doubles the channels.
        width: channels of the first stage.
        large: whether the stem is a 7x7 convolution of stride 2 with a pooling behind it, for large images, instead of a 3x3 one.
        skipped: probability that the last block is skipped for a sample in training (stochastic depth: Huang, Sun, Liu, Sedra,
            Weinberger 2016, arXiv 1603.09382); that of the others rises to it linearly.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        blocks: tuple[int, ...],
        width: int,
        large: bool = False,
        skipped: float = 0.0,
    ) -> None:
        check_image_model(shape, classes, width=width, blocks=min(blocks, default=0), skipped=skipped)
        super().__init__()
        self.pixels = nn.Unflatten(1, shape)
        stem: list[nn.Module] = [
            nn.Conv2d(shape[0], width, 7, stride=2, padding=3, bias=False)
            if large
            else nn.Conv2d(shape[0], width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        if large:
            stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        self.stem = nn.Sequential(*stem)
        channels, count = width, 0
        for stage, number in enumerate(blocks):
            for block in range(number):
                count += 1
                into, channels = channels, width * 2**stage
                stride = 2 if stage and not block else 1
                share = skipped * count / sum(blocks)
                self.add_module(f"stage{stage + 1}_{block}", Block(into, channels, stride=stride, skipped=share))
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(channels, classes)


class Block(nn.Module):
    """Two 3x3 convolutions, each with its norm, added to the input or to what a 1x1 convolution makes of it.

    Args:
        channels_in: of the input.
        channels: of the output.
        stride: of the first convolution and of the shortcut.
        skipped: probability that the convolutions of a sample are left out in training; outside, they count in proportion.
    """

    def __init__(self, channels_in: int, channels: int, *, stride: int = 1, skipped: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride > 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.skipped = skipped

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) -> (B, channels, H / stride, W / stride)."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + kept_paths(y, self.skipped, self.training))


def kept_paths(y: Tensor, skipped: float, training: bool) -> Tensor:
    """What a residual branch (B, ...) adds under stochastic depth: all or nothing of a sample in training, else its mean."""
    if not skipped:
        return y
    if not training:
        return y * (1.0 - skipped)
    return y * torch.rand(y.shape[0], *([1] * (y.dim() - 1)), device=y.device).ge(skipped).to(y.dtype)


def resnet(
    shape: tuple[int, int, int], classes: int, *, depth: int = 20, width: int | None = None, skipped: float = 0.0
) -> ResNet:
    """A residual network of 6 n + 2 layers for small images, or of 18 or 34 for large ones.

    Args:
        shape: (C, H, W) of an image; inputs are flat, (B, C H W).
        classes: numbers out.
        depth: 8, 14, 20, 26, ... for three stages from 16 channels on, 18 or 34 for four stages from 64 on.
        width: channels of the first stage instead.
        skipped: see `ResNet`.

    >>> resnet((1, 28, 28), 10, depth=8)(torch.rand(5, 784)).shape
    torch.Size([5, 10])
    """
    large = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
    if depth in large:
        return ResNet(shape, classes, blocks=large[depth], width=width or 64, large=True, skipped=skipped)
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 18, 34 or 6 n + 2 (8, 14, 20, ...), got {depth}")
    return ResNet(shape, classes, blocks=((depth - 2) // 6,) * 3, width=width or 16, skipped=skipped)
