"""Shared weights: clusters, gradients, bytes, and packing that comes back exactly."""

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import noctule
from noctule.compress.factor import Share
from noctule.compress.factor.sharing import clusters
from noctule.core.convert import Leave, convert_
from noctule.measure import footprint
from noctule.sparse.layers import SparseConv2d, SparseLinear


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=200), st.integers(2, 20))
def test_clusters_are_those_of_plain_k_means(numbers, codes):
    x = torch.tensor(numbers)
    index = clusters(x, codes).long()
    distinct = x.double().unique()
    if len(distinct) <= codes:
        means = distinct
    else:
        means = torch.stack(
            [
                x[index == k].double().mean() if (index == k).any() else torch.tensor(torch.inf).double()
                for k in range(codes)
            ]
        )
    distance = (x.double()[:, None] - means).abs()
    own = distance.gather(1, index[:, None])[:, 0]
    # Lloyd's condition: no other centre is nearer
    assert (own <= distance.min(1).values + 1e-6).all()


def layers():
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(40, 30), torch.randn(5, 40)),
        "convolution": (nn.Conv2d(8, 16, 3), torch.randn(2, 8, 6, 6)),
        "sparse": (SparseLinear(60, 50, density=0.3), torch.randn(5, 60)),
        "sparse convolution": (SparseConv2d(8, 16, 3, density=0.5), torch.randn(2, 8, 6, 6)),
    }


@pytest.mark.parametrize("kind", list(layers()))
def test_values_are_shared_and_a_code_gets_the_gradients_of_its_weights(kind):
    layer, x = layers()[kind]
    name = "values" if kind.startswith("sparse") else "weight"
    plain = copy.deepcopy(layer)
    model = convert_(nn.Sequential(layer), Share(codes=16)).model
    weight = getattr(model[0], name)
    assert len(weight.unique()) == 16
    with torch.no_grad():
        getattr(plain, name).copy_(weight)
    torch.testing.assert_close(model(x), plain(x))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    parameter = model[0].parametrizations[name].original
    index = model[0].parametrizations[name][0].index().long()
    expected = torch.zeros(16).index_add_(0, index, getattr(plain, name).grad.flatten())
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4)
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert len(getattr(model[0], name).unique()) == 16


@pytest.mark.parametrize("kind", list(layers()))
def test_a_saved_state_loads_bit_for_bit(kind, tmp_path):
    layer, x = layers()[kind]
    model = convert_(nn.Sequential(copy.deepcopy(layer)), Share(codes=16)).model
    noctule.save_model(tmp_path, model.state_dict(), {})
    other = convert_(
        nn.Sequential(
            layer.__class__.from_dense(layer.to_dense()) if hasattr(layer, "to_dense") else copy.deepcopy(layer)
        ),
        Share(codes=16),
    ).model
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(noctule.load_model(tmp_path)[0])
    assert torch.equal(model(x), other(x))


def entropy_bytes(index: torch.Tensor) -> float:
    """The least that any code of single symbols takes for these, from their frequencies."""
    shares = torch.bincount(index).double() / len(index)
    shares = shares[shares > 0.0]
    return float(-(shares * shares.log2()).sum()) * len(index) / 8


@pytest.mark.parametrize("codes", [2, 3, 8, 16, 32, 256])
def test_codes_are_held_in_whole_bits_and_stored_at_about_their_entropy(codes):
    torch.manual_seed(0)
    layer = nn.Linear(300, 200, bias=False)
    nn.init.normal_(layer.weight)
    model = convert_(nn.Sequential(layer), Share(codes=codes)).model
    state, book = model.state_dict(), 4 * codes
    index = model[0].parametrizations.weight[0].index()
    assert len(index) == 60_000
    assert footprint(model).total_bytes == 60_000 * (codes - 1).bit_length() // 8 + book
    stored = sum(t.nbytes for t in state.values()) - book
    assert stored < 1.02 * entropy_bytes(index) + 100
    other = convert_(nn.Sequential(nn.Linear(300, 200, bias=False)), Share(codes=codes)).model
    other.load_state_dict(state)
    assert torch.equal(other[0].weight, model[0].weight)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_torn_states_are_refused_or_give_codes(data):
    torch.manual_seed(0)
    model = convert_(nn.Sequential(nn.Linear(20, 20)), Share(codes=5)).model
    state = model.state_dict()
    key = "0.parametrizations.weight.0._extra_state"
    torn = state[key].clone()
    if data.draw(st.booleans()):
        torn = torn[: data.draw(st.integers(0, len(torn) - 1))]
        with pytest.raises(ValueError, match="torn"):
            model.load_state_dict({**state, key: torn})
    else:
        torn[data.draw(st.integers(0, len(torn) - 1))] ^= data.draw(st.integers(1, 255))
        with contextlib.suppress(ValueError):
            model.load_state_dict({**state, key: torn})


def test_few_numbers_are_kept_exactly_and_the_rule_is_repeatable():
    torch.manual_seed(0)
    layer = nn.Linear(30, 30)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(0, 5, (30, 30)) * 0.37)
    before = layer.weight.detach().clone()
    model = convert_(nn.Sequential(layer), Share(codes=8)).model
    assert torch.equal(model[0].weight, before)
    x = torch.randn(5000)
    assert torch.equal(clusters(x, 32), clusters(x.clone(), 32))


def test_what_stays_is_named_with_the_reason():
    embedding, tied = nn.Embedding(30, 20), nn.Linear(20, 30, bias=False)
    tied.weight = embedding.weight
    broken = nn.Linear(20, 20)
    nn.init.constant_(broken.weight, torch.inf)
    model = nn.ModuleDict(
        {
            "tiny": nn.Linear(2, 2),
            "embedding": embedding,
            "tied": tied,
            "broken": broken,
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(20, 20)),
            "empty": SparseLinear(8, 8, weights=0),
            "changed": nn.Linear(20, 20),
        }
    )
    result = convert_(model, Share(codes=16))
    assert list(result.changed) == ["changed"]
    for name, why in {
        "tiny": "bytes",
        "tied": "tied",
        "broken": "finite",
        "normed": "computed",
        "empty": "no numbers",
    }.items():
        assert why in result.left[name]
    assert type(tied) is nn.Linear
    with pytest.raises(Leave):
        clusters(torch.tensor([torch.nan]), 2)
    for options in ({"codes": 1}, {"codes": 257}, {"iterations": 0}):
        with pytest.raises(ValueError, match="codes must"):
            Share(**options)


def test_another_model_s_state_is_refused():
    torch.manual_seed(0)
    one, other = (convert_(nn.Sequential(nn.Linear(n, 20)), Share(codes=16)).model for n in (20, 30))
    with pytest.raises(ValueError, match="600 weights that share 16 values"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        one.load_state_dict(nn.Sequential(nn.Linear(20, 20)).state_dict())


def test_a_shared_weight_becomes_plain_again():
    torch.manual_seed(0)
    model = convert_(nn.Sequential(nn.Linear(20, 20)), Share(codes=4)).model
    weight = model[0].weight.detach().clone()
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, weight)
