"""Shared weights: clusters, gradients, bytes, and packing that comes back exactly."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from noctule.compress.factor import Share, entropy_bytes, pack, pack_state, shared_sizes, unpack, unpack_state
from noctule.compress.factor.sharing import clusters
from noctule.core.convert import Leave, convert_
from noctule.measure import footprint
from noctule.sparse.layers import SparseConv2d, SparseLinear

CODES = st.integers(1, 256).flatmap(lambda k: st.tuples(st.just(k), st.lists(st.integers(0, k - 1), max_size=3000)))


@settings(max_examples=60, deadline=None)
@given(CODES)
def test_unpacking_gives_what_was_packed(given):
    codes, symbols = given
    x = torch.tensor(symbols, dtype=torch.uint8)
    packed = pack(x, codes)
    assert torch.equal(unpack(packed), x)
    blocks = -(-len(x) // 2048)
    # Huffman's codes take less than a bit a symbol more than the entropy
    assert entropy_bytes(x) <= len(packed) - 10 - codes - 2 * blocks < entropy_bytes(x) + len(x) / 8 + 1


@pytest.mark.parametrize("n", [2047, 2048, 2049, 4096, 300_001])
def test_blocks_and_skewed_codes(n):
    # Fibonacci frequencies make codes as long as there are symbols: they are cut at 16 bits
    weights = np.array([1.618**k for k in range(40)])
    x = torch.from_numpy(np.random.default_rng(0).choice(40, n, p=weights / weights.sum()).astype(np.uint8))
    packed = pack(x, 40)
    assert torch.equal(unpack(packed), x)
    if n > 4096:
        assert len(packed) < 1.06 * entropy_bytes(x)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_torn_bytes_are_refused_or_give_codes(data):
    packed = bytearray(pack(torch.arange(200, dtype=torch.uint8) % 7, 7))
    if data.draw(st.booleans()):
        with pytest.raises(ValueError, match="torn"):
            unpack(bytes(packed[: data.draw(st.integers(0, len(packed) - 1))]))
    else:
        at = data.draw(st.integers(0, len(packed) - 1))
        packed[at] ^= data.draw(st.integers(1, 255))
        with contextlib.suppress(ValueError):
            assert unpack(bytes(packed)).dtype is torch.uint8


def test_what_cannot_be_packed_is_refused():
    for x, codes in (
        (torch.zeros(3), 2),
        (torch.zeros(3, 3, dtype=torch.uint8), 2),
        (torch.zeros(3, dtype=torch.uint8), 0),
    ):
        with pytest.raises(ValueError, match="pack takes"):
            pack(x, codes)
    with pytest.raises(ValueError, match="code 5"):
        pack(torch.tensor([5], dtype=torch.uint8), 5)


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
def test_a_packed_state_loads_bit_for_bit(kind):
    layer, x = layers()[kind]
    model = convert_(nn.Sequential(copy.deepcopy(layer)), Share(codes=16)).model
    state = pack_state(model)
    other = convert_(
        nn.Sequential(
            layer.__class__.from_dense(layer.to_dense()) if hasattr(layer, "to_dense") else copy.deepcopy(layer)
        ),
        Share(codes=16),
    ).model
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(unpack_state(other, state))
    assert torch.equal(model(x), other(x))


def test_bytes_are_counted():
    torch.manual_seed(0)
    model = convert_(nn.Sequential(nn.Linear(300, 200, bias=False)), Share(codes=16)).model
    size = shared_sizes(model)["0"]
    assert size.weights == 60_000
    assert size.plain_bytes == 240_000
    assert size.held_bytes == 30_000 + 64 == footprint(model).total_bytes
    assert size.entropy_bytes < size.packed_bytes < 1.03 * size.entropy_bytes
    state = pack_state(model)
    assert sum(t.nbytes for t in state.values()) == size.packed_bytes
    nn.init.normal_(model[0].parametrizations.weight.original)


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
    with pytest.raises(ValueError, match="400 weights, the model's layer 600"):
        unpack_state(other, pack_state(one))
    with pytest.raises(ValueError, match="the state has no"):
        unpack_state(one, nn.Linear(2, 2).state_dict())


def test_a_shared_weight_becomes_plain_again():
    torch.manual_seed(0)
    model = convert_(nn.Sequential(nn.Linear(20, 20)), Share(codes=4)).model
    weight = model[0].weight.detach().clone()
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, weight)
