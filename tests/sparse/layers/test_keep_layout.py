"""Pooling and normalisation are the same functions in every layout, and leave feature-major images feature-major."""

import copy

import pytest
import torch
from torch import Tensor, nn

from noctule.core.convert import convert_
from noctule.sparse.layers import FuseEpilogue, SparseConv2d
from noctule.sparse.layers.keep_layout import KeepLayout

KINDS = [
    lambda: nn.MaxPool2d(2),
    lambda: nn.MaxPool2d(3, stride=2, padding=1, dilation=1, ceil_mode=True),
    lambda: nn.AvgPool2d(2),
    lambda: nn.AvgPool2d((2, 3), stride=1, padding=1, count_include_pad=False),
    lambda: nn.BatchNorm2d(5),
    lambda: nn.BatchNorm2d(5, affine=False, momentum=None),
    lambda: nn.BatchNorm2d(5, track_running_stats=False),
]


def feature_major(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def is_feature_major(x: Tensor) -> bool:
    return x.permute(1, 2, 3, 0).is_contiguous()


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [1, 6])
def test_the_function_and_its_gradients_stay(make, training: bool, batch: int):
    plain = make().double().train(training)
    with torch.no_grad():
        for p in plain.parameters():
            p.uniform_(0.5, 2)
    kept = convert_(copy.deepcopy(plain), KeepLayout()).model
    assert type(kept) is not type(plain)
    for _ in range(2):  # running averages move
        x = torch.randn(batch, 5, 9, 8, dtype=torch.float64).mul(2).round()  # with ties
        for layout in (feature_major, Tensor.contiguous, lambda x: x.to(memory_format=torch.channels_last)):
            ours, theirs = layout(x).clone().requires_grad_(), x.clone().requires_grad_()
            a, b = kept(ours), plain(theirs)
            dy = torch.randn_like(b)
            a.backward(layout(dy))
            b.backward(dy)
            assert a.shape == b.shape
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(ours.grad, theirs.grad)
            for p, q in zip(kept.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
    assert kept.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(kept.state_dict(), plain.state_dict())


@pytest.mark.parametrize("make", KINDS)
def test_feature_major_in_and_out_and_back(make):
    kept = convert_(make(), KeepLayout()).model
    x = feature_major(torch.randn(6, 5, 9, 8)).requires_grad_()
    y = kept(x)
    assert is_feature_major(y)
    (dx,) = torch.autograd.grad(y, x, feature_major(torch.randn(y.shape)))
    assert is_feature_major(dx)
    assert kept(x.detach().contiguous()).is_contiguous()
    assert kept.eval()(x[:1]).shape == y[:1].shape
    if not isinstance(kept, nn.BatchNorm2d):
        assert kept(x[0]).shape == y[0].shape


def test_it_undoes_no_more_than_it_may():
    hooks = []
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.MaxPool2d(2, return_indices=True))
    model[1].register_forward_hook(lambda *_: hooks.append(1))
    weight = model[1].weight
    report = convert_(model, KeepLayout())
    assert list(report.changed) == ["1"]
    assert report.left == {"2": "it returns indices too"}
    model(torch.randn(2, 1, 8, 8))
    assert hooks
    assert model[1].weight is weight
    assert list(copy.deepcopy(model).state_dict()) == list(model.state_dict())


def test_between_sparse_convolutions_nothing_is_copied():
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        first, second = SparseConv2d(2, 6, 3, padding=1, density=0.5), SparseConv2d(6, 4, 3, density=0.5)
        return nn.Sequential(
            first, nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(6), second, nn.Flatten(), nn.Linear(16, 3)
        )

    plain, kept = network(), network()
    convert_(kept, FuseEpilogue())
    convert_(kept, KeepLayout())
    seen: list[Tensor] = []
    kept[4].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(7, 2, 8, 8)
    for model in (plain, kept):
        model(x).square().sum().backward()
    assert is_feature_major(seen[0])
    for p, q in zip(plain.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
