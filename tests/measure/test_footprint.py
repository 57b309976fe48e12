import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from noctule.measure import footprint


class Topology:
    def __init__(self, nbytes):
        self.nbytes = nbytes


class SparseLayer(nn.Module):
    def __init__(self, topology):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(50))
        self.topology = topology


def step(model, optimizer, features):
    model(torch.ones(2, features)).sum().backward()
    optimizer.step()


def test_a_table_small_enough_to_check_by_eye():
    model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20))
    numbers = 10 * 20 + 20 + 20 + 20
    found = footprint(model)
    assert found.parameters == numbers
    assert found.as_dict() == {
        "parameters": numbers,
        "weights_bytes": 4 * numbers,
        "buffer_bytes": 20 * 4 + 20 * 4 + 8,
        "index_bytes": 0,
        "gradient_bytes": 0,
        "optimizer_bytes": 0,
        "total_bytes": 4 * numbers + 168,
    }
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, 10)
    found = footprint(model, optimizer)
    assert found.gradient_bytes == 4 * numbers
    assert found.optimizer_bytes == 2 * 4 * numbers + 4 * 4, "two moments each, and a step count for each tensor"
    assert "260 parameters" in str(found)
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict()


def test_gradients_can_be_counted_before_there_are_any():
    model = nn.Linear(10, 10)
    model.bias.requires_grad_(False)
    assert footprint(model).gradient_bytes == 0
    assert footprint(model, all_gradients=True).gradient_bytes == 400
    model(torch.ones(1, 10)).sum().backward()
    assert footprint(model, all_gradients=True) == footprint(model)


def test_tied_weights_views_and_shared_topologies_count_once():
    shared = Topology(1000)
    model = nn.Sequential(
        SparseLayer(shared), SparseLayer(shared), SparseLayer(Topology(10)), nn.Linear(5, 5, bias=False)
    )
    model.tied = model[3]
    model.view = nn.Parameter(model[3].weight.detach()[1:])
    found = footprint(model)
    assert found.index_bytes == 1010
    assert found.weights_bytes == 4 * (3 * 50 + 25)


def test_a_topology_without_a_size_and_other_attributes_of_that_name_are_left_alone():
    model = nn.Sequential(SparseLayer(None), SparseLayer("ring"), SparseLayer(Topology(None)))
    assert footprint(model).index_bytes == 0


def test_the_whole_is_the_sum_of_its_parts():
    parts = [nn.Linear(3, 4), nn.BatchNorm1d(4), SparseLayer(Topology(7))]
    whole = footprint(nn.ModuleList(parts))
    for name in whole.as_dict():
        assert getattr(whole, name) == sum(getattr(footprint(part), name) for part in parts)


def test_a_copy_of_a_model_holds_as_much():
    model = nn.Sequential(nn.Linear(7, 3), nn.Dropout(), nn.LSTM(3, 3))
    assert footprint(copy.deepcopy(model)) == footprint(model)


@pytest.mark.parametrize("name", ["SGD", "LBFGS", "Adagrad", "RMSprop", "NAdam", "Adafactor"])
def test_the_state_of_any_optimizer_is_found(name):
    model = nn.Linear(4, 3)
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).pow(2).sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    found = footprint(model, optimizer).optimizer_bytes
    assert found >= (4 * 3 + 4) if name == "Adafactor" else found >= footprint(model).weights_bytes
    assert footprint(model, optimizer, optimizer).optimizer_bytes == found


def test_two_optimizers_add_up():
    a, b = nn.Linear(4, 3), nn.Linear(3, 2)
    first, second = torch.optim.Adam(a.parameters()), torch.optim.Adam(b.parameters())
    both = nn.Sequential(a, b)
    both(torch.ones(1, 4)).sum().backward()
    first.step()
    second.step()
    assert (
        footprint(both, first, second).total_bytes == footprint(a, first).total_bytes + footprint(b, second).total_bytes
    )


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_tensors_of_torch_are_values_and_indices():
    model = nn.Embedding(100, 4, sparse=True)
    model(torch.tensor([1, 2, 3])).sum().backward()
    assert footprint(model).gradient_bytes == 3 * 4 * 4 + 3 * 8
    diagonal = torch.sparse_csr_tensor(
        torch.arange(11), torch.arange(10), torch.ones(10), (10, 10), check_invariants=False
    )
    csr = nn.ParameterList([nn.Parameter(diagonal)])
    assert footprint(csr).weights_bytes == 40
    assert footprint(csr).index_bytes == 8 * (11 + 10)


def test_models_that_are_empty_or_on_no_device():
    assert footprint(nn.ReLU()).total_bytes == 0
    assert footprint(nn.Linear(3, 3, device="meta")).weights_bytes == 4 * 12
    assert footprint(nn.PReLU(0)).total_bytes == 0


def test_a_footprint_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        footprint(nn.ReLU()).parameters = 3
