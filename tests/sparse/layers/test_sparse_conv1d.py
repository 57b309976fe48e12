"""`nn.Conv1d` as a sparse layer: laws against the dense one that is masked to the same places."""

import copy

import pytest
import torch
from torch import nn

from noctule.core.convert import convert_
from noctule.core.method import attach
from noctule.sparse.layers import SparseConv1d, SparseConv2d, ToDense, ToSparse
from noctule.sparse.layers.stand_in import StandIn
from noctule.sparse.rewire import set_

OPTIONS = [
    {},
    {"padding": 1},
    {"padding": "same"},
    {"padding": "valid", "stride": 2},
    {"stride": 3, "padding": 2, "dilation": 2},
    {"groups": 2, "padding": 1},
    {"bias": False},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize("batch", [(), (5,)])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_it_is_the_dense_one_masked_to_the_same_places(options, kernel, batch):
    torch.manual_seed(0)
    sparse = convert_(nn.Conv1d(4, 6, kernel, **options), ToSparse(density=0.5, fresh=False)).model
    assert isinstance(sparse, SparseConv1d)
    dense = convert_(copy.deepcopy(sparse), ToDense()).model
    assert type(dense) is nn.Conv1d
    inputs = [torch.randn(*batch, 4, 15).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    ours, theirs = sparse(inputs[0]), dense(inputs[1])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(theirs)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-4)
    at = sparse.conv2d.topology.keys()
    torch.testing.assert_close(sparse.conv2d.values.grad, dense.weight.grad.flatten()[at], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_there_and_back_is_the_identity(options):
    dense = nn.Conv1d(4, 6, 3, **options).eval()
    dense.weight.requires_grad_(False)
    sparse = convert_(copy.deepcopy(dense), ToSparse(density=1.0, fresh=False)).model
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "dilation",
        "groups",
        "padding",
        "padding_mode",
    ):
        assert getattr(sparse, name) == getattr(dense, name), name
    assert isinstance(sparse.weight, StandIn)
    assert sparse.weight.shape == dense.weight.shape
    assert (sparse.bias is None) == (dense.bias is None)
    back = convert_(sparse, ToDense()).model
    assert not back.training
    assert not back.weight.requires_grad
    assert str(back) == str(dense)
    for a, b in zip(back.parameters(), dense.parameters(), strict=True):
        assert torch.equal(a, b)


def test_its_connections_move_and_its_state_is_loaded():
    torch.manual_seed(0)
    models = [convert_(nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU()), ToSparse(density=0.3)).model for _ in range(2)]
    layer, before = models[0][0].conv2d, models[0][0].conv2d.topology
    assert isinstance(layer, SparseConv2d)
    optimizer = torch.optim.AdamW(models[0].parameters(), lr=1e-2)
    with attach(models[0], optimizer, set_(every=1)):
        for _ in range(3):
            optimizer.zero_grad()
            models[0](torch.randn(5, 4, 15)).square().sum().backward()
            optimizer.step()
    assert layer.topology != before
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(5, 4, 15)
    assert torch.equal(models[0](x), models[1](x))


def test_what_has_no_sparse_form_is_left_with_the_reason():
    model = nn.ModuleDict(
        {
            "circular": nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
            "depthwise": nn.Conv1d(4, 4, 3, groups=4),
            "fine": nn.Conv1d(4, 6, 3),
        }
    )
    done = convert_(model, ToSparse(density=0.5))
    assert set(done.changed) == {"fine"}
    assert "pads with 'circular'" in done.left["circular"]
    assert "a kernel of its own" in done.left["depthwise"]


def test_measure_first_measures_lines():
    done = convert_(nn.ModuleList([nn.Conv1d(4, 4, 3)]), ToSparse(density=0.5, measure_first=True, batch=2))
    assert {**done.left, **done.changed}.keys() == {"0"}
