"""A network of depthwise separable convolutions with inverted residuals.

Sandler, Howard, Zhu, Zhmoginov, Chen 2018, "MobileNetV2", arXiv 1801.04381. Differs from the paper: widths and strides are
arguments, with defaults for small images.
"""

from torch import Tensor, nn

from noctule.models.checks import check_image_model

Stages = tuple[tuple[int, int, int, int], ...]
"""(expansion, channels, blocks, stride of the first block) of each stage."""
SMALL: Stages = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 2, 2), (4, 64, 2, 1))
"""Stages for images of about 30 x 30 pixels."""
LARGE: Stages = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
"""Stages of the paper, for images of 224 x 224 pixels behind a stem of stride 2."""


class InvertedResidual(nn.Module):
    """A 1x1 convolution that widens, a depthwise 3x3 one, and a 1x1 one that narrows, added to the input where shapes allow."""

    def __init__(self, channels_in: int, channels: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        widen = [nn.Conv2d(channels_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        self.body = nn.Sequential(
            *(widen if expansion > 1 else []),
            nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) -> (B, channels, H / stride, W / stride)."""
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet(
    shape: tuple[int, int, int],
    classes: int,
    *,
    stages: Stages = SMALL,
    stem: int = 16,
    stem_stride: int = 1,
    last: int = 256,
    dropout: float = 0.0,
) -> nn.Sequential:
    """A MobileNetV2 for small images.

    Args:
        shape: (C, H, W) of an image; inputs are flat, (B, C H W).
        classes: numbers out.
        stages: see `Stages`.
        stem: channels of the first convolution.
        stem_stride: its stride.
        last: channels before the pooling.
        dropout: before the last layer, in [0, 1).

    >>> import torch
    >>> mobilenet((1, 28, 28), 10)(torch.rand(5, 784)).shape
    torch.Size([5, 10])
    """
    check_image_model(shape, classes, stem=stem, last=last, stages=min((min(stage) for stage in stages), default=0))
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    first = [nn.Conv2d(shape[0], stem, 3, stride=stem_stride, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU6()]
    modules: list[nn.Module] = [nn.Unflatten(1, shape), *first]
    channels_in = stem
    for expansion, channels, blocks, stride in stages:
        for block in range(blocks):
            modules.append(InvertedResidual(channels_in, channels, expansion=expansion, stride=1 if block else stride))
            channels_in = channels
    modules += [nn.Conv2d(channels_in, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6()]
    modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(last, classes)]
    return nn.Sequential(*modules)
