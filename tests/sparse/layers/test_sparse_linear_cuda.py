"""A sparse layer on a GPU, through the reference products."""

import pytest
import torch
from torch import nn

from noctule.core.convert import convert_
from noctule.core.method import attach
from noctule.core.optim import param_groups
from noctule.sparse.layers import FuseEpilogue, SparseLinear, ToDense, ToSparse
from noctule.sparse.rewire import gse, rigl, set_

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(30, 20), nn.LeakyReLU(0.1), nn.Dropout(dropout), nn.Linear(20, 5))
    convert_(model, ToSparse(density=0.3))
    return convert_(model, FuseEpilogue()).model


def step(model: nn.Module, x: torch.Tensor):
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(3)  # the seed of the dropout is drawn on the CPU, so the mask is the same everywhere
    y = model(x)
    y.pow(2).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(17, 30), (30,), (2, 3, 30), (0, 30)], ids=str)
def test_it_is_the_function_of_the_cpu(dropout, shape):
    model, x = network(dropout), torch.randn(shape)
    expected = step(model, x)
    model.cuda()
    assert model[0].topology.device.type == "cuda"
    actual = step(model, x.cuda())
    for a, e in zip(actual, expected):
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), e, atol=1e-4, rtol=1e-4)
    model.cpu()
    for a, e in zip(step(model, x), expected):
        assert torch.equal(a, e)


def test_made_there_and_back():
    layer = SparseLinear(30, 20, density=0.2, device="cuda")
    dense = convert_(nn.Sequential(layer), ToDense()).model[0]
    assert dense.weight.is_cuda
    again = SparseLinear.from_dense(dense)
    assert again.topology == layer.topology
    assert torch.equal(again.values, layer.values)
    assert convert_(nn.Linear(8, 4, device="cuda"), ToSparse(density=0.5)).model.values.is_cuda


@pytest.mark.parametrize("weights", [60, 7])
def test_states_cross_devices(weights):
    here, there = SparseLinear(30, 20, weights=60), SparseLinear(30, 20, weights=weights, device="cuda")
    here.load_state_dict(there.state_dict())
    assert here.topology == there.topology
    assert torch.equal(here.values, there.values.cpu())
    there.load_state_dict(SparseLinear(30, 20, weights=60).state_dict())
    assert there.values.is_cuda
    assert there.topology.device.type == "cuda"
    assert there(torch.randn(3, 30, device="cuda")).shape == (3, 20)


@pytest.mark.parametrize("kind", [set_, gse, lambda **options: rigl(until=100, **options)], ids=["set", "gse", "rigl"])
def test_connections_move(kind):
    model = network().cuda()
    optimizer = torch.optim.Adam(param_groups(model), lr=0.01)
    before = [model[k].topology for k in (0, 3)]
    with attach(model, optimizer, kind(every=1)) as session:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 30, device="cuda")).pow(2).mean().backward()
            optimizer.step()
    for old, layer in zip(before, (model[0], model[3])):
        assert layer.topology != old
        assert layer.topology.size == old.size
        assert layer.topology.device.type == "cuda"
        assert (layer.topology.keys().diff() > 0).all()
    assert all(moved > 0 for moved in session.methods[0].moved.values())


def test_the_default_device_of_torch():
    with torch.device("cuda"):
        layer = SparseLinear(30, 20, density=0.2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        with attach(layer, optimizer, gse(every=1)):
            layer(torch.randn(4, 30)).sum().backward()
            optimizer.step()
    assert layer.values.is_cuda
