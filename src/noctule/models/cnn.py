"""A convolutional network in the manner of VGG, small enough for one processor."""

from collections.abc import Sequence

from torch import nn


def cnn(
    shape: tuple[int, int, int],
    classes: int,
    *,
    channels: Sequence[int] = (32, 64, 128),
    convolutions: int = 2,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Stages of 3x3 convolutions with ReLU, each stage ending in a pooling that halves the image and a batch normalisation.

    The pixels are normalised too, so they may come in any scale; the last image is averaged and dropped out before the one linear
    layer. A normalisation stands behind the pooling, not behind each convolution: there it reads a quarter of the numbers, and
    `FuseEpilogue` can fold the ReLU into the convolution.

    Args:
        shape: (C, H, W) of an image; inputs are flat, (B, C H W).
        classes: numbers out.
        channels: of each stage.
        convolutions: in each stage.
        dropout: in [0, 1).

    >>> import torch
    >>> cnn((1, 28, 28), 10)(torch.rand(5, 784)).shape
    torch.Size([5, 10])
    """
    if min(*shape, *channels, classes, convolutions) < 1 or not channels:
        raise ValueError(
            f"shape, classes, channels and convolutions must be at least 1, got {shape}, {classes}, {tuple(channels)} and "
            f"{convolutions}"
        )
    if min(shape[1:]) < 2 ** len(channels):
        raise ValueError(
            f"images of {shape[1]} x {shape[2]} pixels cannot be halved {len(channels)} times: give fewer channels=, one for "
            "each halving"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    modules: list[nn.Module] = [nn.Unflatten(1, shape), nn.BatchNorm2d(shape[0], affine=False)]
    channels_in = shape[0]
    for channels_out in channels:
        for _ in range(convolutions):
            modules += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU()]
            channels_in = channels_out
        modules += [nn.MaxPool2d(2), nn.BatchNorm2d(channels_out)]
    modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if dropout:
        modules.append(nn.Dropout(dropout))
    modules.append(nn.Linear(channels_in, classes))
    return nn.Sequential(*modules)
