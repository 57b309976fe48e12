"""What other people's code finds at ``layer.weight``: right answers, or a word on what to do."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from noctule.core.convert import convert_
from noctule.sparse.layers import SparseAttention, SparseLinear, ToSparse
from noctule.sparse.layers.stand_in import StandIn


def test_who_asks_for_the_weight_gets_what_it_is_and_its_product():
    dense = nn.Linear(6, 4)
    sparse = SparseLinear.from_dense(dense, density=1.0)
    weight = sparse.weight
    assert isinstance(weight, StandIn)
    assert (weight.shape, weight.dtype, weight.device) == (dense.weight.shape, torch.float32, dense.weight.device)
    assert weight.requires_grad
    assert repr(weight) == "StandIn((4, 6), dtype=torch.float32, device='cpu')"
    x = torch.randn(3, 2, 6, requires_grad=True)
    y = nn.functional.linear(x, weight, bias=sparse.bias)
    torch.testing.assert_close(y, dense(x))
    y.sum().backward()
    assert sparse.values.grad is not None
    assert sparse.bias.grad is not None
    with pytest.raises(ValueError, match="6 features"):
        nn.functional.linear(torch.randn(2, 12), weight)


def test_who_wants_its_numbers_is_told_what_to_do():
    model = nn.Conv2d(3, 4, 2)
    weight = convert_(model, ToSparse(density=0.5)).model.weight
    assert weight.shape == (4, 3, 2, 2)
    assert hasattr(weight, "data")
    assert not hasattr(weight, "grad")
    for read in (
        lambda: nn.init.orthogonal_(weight),
        lambda: nn.init.trunc_normal_(weight),
        lambda: weight[0],
        lambda: weight.bfloat16(),
        lambda: weight.data.norm(),
        lambda: weight.abs().sum(),
        weight.tolist,
        lambda: weight.detach().numpy(),
        weight.data_ptr,
        weight.untyped_storage,
        lambda: copy.deepcopy(weight),
        lambda: weight.register_hook(print),
        lambda: weight.data.copy_(torch.zeros(4, 3, 2, 2)),
        lambda: weight.data.mul_(torch.ones(4, 1, 1, 1)),
        lambda: nn.functional.conv2d(torch.randn(1, 3, 5, 5), weight),
    ):
        with pytest.raises(RuntimeError, match=r"layer\.to_dense\(\)\.weight"):
            read()
    for read in (lambda: weight.grad, lambda: setattr(weight, "grad", None), lambda: setattr(weight, "data", weight)):
        with pytest.raises(AttributeError, match=r"layer\.values \(and its grad\)"):
            read()


def test_who_draws_the_weight_draws_the_values():
    layer = SparseLinear(60, 40, density=0.5)
    for draw, mean, std in (
        (lambda: nn.init.normal_(layer.weight, 0.5, 2.0), 0.5, 2.0),
        (lambda: nn.init.xavier_uniform_(layer.weight), 0.0, (2 / 100) ** 0.5),
        (lambda: nn.init.kaiming_normal_(layer.weight), 0.0, (2 / 60) ** 0.5),
        (lambda: layer.weight.data.normal_(mean=0.0, std=0.3), 0.0, 0.3),
        (lambda: layer.weight.data.uniform_(-1, 1), 0.0, 3**-0.5),
    ):
        draw()
        assert abs(layer.values.mean().item() - mean) < 0.2 * std
        assert abs(layer.values.std().item() - std) < 0.1 * std
    nn.init.ones_(layer.weight)
    layer.weight.data.mul_(0.5)
    with torch.no_grad():
        layer.weight.add_(0.25)
    assert (layer.values == 0.75).all()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):  # as of a dense layer
        layer.weight.zero_()


def test_who_freezes_the_weight_freezes_the_values():
    layer = SparseLinear(6, 4, density=0.5)
    layer.weight.requires_grad = False
    assert not layer.values.requires_grad
    layer.weight.requires_grad_()
    assert layer.values.requires_grad
    assert layer.weight.requires_grad
    layer.weight.requires_grad_(False)
    assert not layer.values.requires_grad
    attention = SparseAttention(*(SparseLinear(8, 8, density=0.4) for _ in range(4)), num_heads=2)
    attention.in_proj_weight.requires_grad = False
    assert [p.values.requires_grad for p in (attention.q_proj, attention.v_proj, attention.out_proj)] == [
        False,
        False,
        True,
    ]
    nn.init.zeros_(attention.in_proj_weight)
    assert not attention.k_proj.values.any()
    assert attention.out_proj.values.any()


def test_no_dense_weight_can_be_set():
    layer = SparseLinear(6, 4, density=0.5)
    for change in (
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn(4, 6))),
        lambda: layer.register_parameter("weight", nn.Parameter(torch.randn(4, 6))),
        lambda: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda: prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0),
    ):
        with pytest.raises(TypeError, match=r"no dense weight .* 'values'"):
            change()
    with pytest.raises(RuntimeError, match=r"layer\.values"):
        parametrizations.spectral_norm(layer, "weight")
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
