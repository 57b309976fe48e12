"""The convolutional network: its stages, what it makes of images in any scale, and what the rules make of it."""

import pytest
import torch
from torch import nn

from noctule.core.convert import convert_
from noctule.models import cnn
from noctule.sparse.layers import FuseEpilogue, SparseConv2d, SparseLinear, ToSparse
from noctule.sparse.layers.keep_layout import KeepLayout


def kinds(model: nn.Module) -> str:
    return " ".join(type(m).__name__.replace("2d", "") for m in model.children())


def test_stages_of_convolutions_end_in_pooling_and_normalisation():
    assert kinds(cnn((1, 8, 8), 10, channels=[4, 6], convolutions=1)) == (
        "Unflatten BatchNorm Conv ReLU MaxPool BatchNorm Conv ReLU MaxPool BatchNorm AdaptiveAvgPool Flatten Linear"
    )
    model = cnn((3, 9, 12), 5, channels=[4, 6], convolutions=2, dropout=0.5)
    assert [(m.in_channels, m.out_channels) for m in model if isinstance(m, nn.Conv2d)] == [
        (3, 4),
        (4, 4),
        (4, 6),
        (6, 6),
    ]
    assert [m.p for m in model if isinstance(m, nn.Dropout)] == [0.5]
    assert model(torch.rand(2, 3 * 9 * 12)).shape == (2, 5)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8)])
def test_the_images_of_the_built_in_sets_fit(shape: tuple[int, int, int]):
    assert cnn(shape, 10)(torch.rand(2, torch.Size(shape).numel())).shape == (2, 10)


def test_pixels_may_come_in_any_scale():
    model, x = cnn((1, 8, 8), 3, channels=[4]), torch.rand(50, 64)
    torch.testing.assert_close(model(x), model(x * 255 - 17), rtol=1e-3, atol=1e-4)


def test_made_sparse_every_relu_is_folded_and_the_layout_kept():
    dense = cnn((1, 8, 8), 10)
    names = list(dense.state_dict())
    model = convert_(dense, ToSparse(density=0.1)).model
    for rule in (FuseEpilogue(), KeepLayout()):
        model = convert_(model, rule).model
    assert sum(isinstance(m, SparseConv2d) for m in model) == 6
    assert isinstance(model[-1], SparseLinear)
    assert not any(type(m) in (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.BatchNorm2d) for m in model)
    assert [n for n in names if "weight" not in n] == [
        n for n in model.state_dict() if n in names and "weight" not in n
    ]
    model(torch.rand(4, 64)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((1, 8, 8), {"channels": []}, "at least 1"),
        ((1, 8, 8), {"channels": [4, 0]}, "at least 1"),
        ((1, 8, 8), {"convolutions": 0}, "at least 1"),
        ((1, 28, 7), {}, "28 x 7 pixels cannot be halved 3 times"),
        ((1, 8, 8), {"dropout": 1.0}, "dropout"),
    ],
)
def test_what_makes_no_sense_is_refused(shape, options, says):
    with pytest.raises(ValueError, match=says):
        cnn(shape, 10, **options)
