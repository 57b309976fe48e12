"""The image models have the sizes of their papers, take flat images, and refuse what cannot be."""

import pytest
import torch
from torch import nn

from noctule.models import ViT, mobilenet, resnet
from noctule.models.mobilenet import LARGE
from noctule.models.resnet import kept_paths


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (lambda: resnet((3, 32, 32), 10, depth=20), 272_474),  # 0.27 M in the paper, and 1x1 shortcuts
        (lambda: resnet((3, 32, 32), 10, depth=56), 855_770),  # 0.85 M
        (lambda: resnet((3, 224, 224), 1000, depth=18), 11_689_512),
        (lambda: mobilenet((3, 224, 224), 1000, stages=LARGE, stem=32, stem_stride=2, last=1280), 3_504_872),
    ],
    ids=["resnet-20", "resnet-56", "resnet-18", "mobilenet-v2"],
)
def test_they_have_the_sizes_of_their_papers(make, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == parameters


@pytest.mark.parametrize(
    "make",
    [
        lambda: resnet((2, 12, 8), 5, depth=8, width=4, skipped=0.4),
        lambda: resnet((2, 32, 32), 5, depth=18, width=4),
        lambda: mobilenet((2, 12, 8), 5),
        lambda: ViT((2, 12, 8), 5, width=8, heads=2, depth=2),
    ],
    ids=["resnet-8", "resnet-18", "mobilenet", "vit"],
)
def test_they_take_flat_images_and_every_parameter_learns(make):
    model = make()
    pixels = 2 * 32 * 32 if any(m.kernel_size == (7, 7) for m in model.modules() if isinstance(m, nn.Conv2d)) else 192
    y = model(torch.rand(6, pixels))
    assert y.shape == (6, 5)
    y.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_branch_under_stochastic_depth_is_right_on_average():
    y = torch.rand(2000, 3)
    kept = kept_paths(y, 0.25, True)
    assert ((kept == y).all(1) | (kept == 0).all(1)).all()
    assert (kept == y).all(1).float().mean().item() == pytest.approx(0.75, abs=0.05)
    assert torch.equal(kept_paths(y, 0.25, False), y * 0.75)
    assert kept_paths(y, 0.0, True) is y


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: resnet((1, 8, 8), 10, depth=9), "6 n \\+ 2"),
        (lambda: resnet((1, 8, 8), 0), "at least 1"),
        (lambda: resnet((1, 8, 8), 10, skipped=1.0), "skipped"),
        (lambda: mobilenet((0, 8, 8), 10), "at least 1"),
        (lambda: mobilenet((1, 8, 8), 10, dropout=1.0), "dropout"),
        (lambda: ViT((1, 8, 8), 10, patch=3), "must divide"),
        (lambda: ViT((1, 8, 8), 10, width=10, heads=4), "must divide"),
    ],
)
def test_what_cannot_be_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
