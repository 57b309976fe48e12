"""Low rank: full rank changes nothing, ranks follow the energy and the budget, bad ones are refused."""

import copy

import pytest
import torch
from torch import nn

from noctule.compress.factor import Factor, Factored, low_rank, tucker2
from noctule.core.convert import convert_


def of_rank(rows, columns, rank):
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, rank) @ torch.randn(rank, columns))
    return layer


@pytest.mark.parametrize(("rows", "columns"), [(7, 12), (12, 7), (8, 8), (1, 5)])
def test_a_linear_layer_at_full_rank_is_the_same_function(rows, columns):
    torch.manual_seed(0)
    layer, x = nn.Linear(columns, rows), torch.randn(4, 3, columns)
    new = low_rank(layer, min(rows, columns))
    torch.testing.assert_close(new(x), layer(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new.weight, layer.weight, atol=1e-5, rtol=1e-5)
    assert new.lost < 1e-10


def test_a_linear_layer_loses_what_its_smallest_singular_values_hold():
    torch.manual_seed(0)
    layer = nn.Linear(9, 6)
    squares = torch.linalg.svdvals(layer.weight.detach().double()).square()
    for rank in range(1, 7):
        assert low_rank(layer, rank).lost == pytest.approx(float(squares[rank:].sum() / squares.sum()), abs=1e-6)


def test_a_weight_of_zeros_still_learns():
    layer = nn.Linear(6, 5)
    nn.init.zeros_(layer.weight)
    new = low_rank(layer, 2)
    assert not new.weight.any()
    new(torch.ones(3, 6)).sum().backward()
    assert new.up.weight.grad.abs().sum() > 0


OPTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": 2, "dilation": 2},
    {"padding": "same", "padding_mode": "circular"},
    {"bias": False},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_convolution_at_full_ranks_is_the_same_function(options):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(5, 7, 3, **options), torch.randn(2, 5, 11, 9)
    new = tucker2(layer, 5, 7)
    torch.testing.assert_close(new(x), layer(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new.weight, layer.weight, atol=1e-5, rtol=1e-5)


def test_a_convolution_of_1x1_is_taken_as_a_matrix():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(5, 7, 1, stride=2, padding=1), torch.randn(2, 5, 8, 8)
    torch.testing.assert_close(low_rank(layer, 5)(x), layer(x), atol=1e-5, rtol=1e-5)
    assert [m.weight.shape[:2] for m in convert_(nn.Conv2d(40, 40, 1), Factor(parameters=800)).model] == [
        (10, 40),
        (40, 10),
    ]


def test_iterations_lose_no_more_than_the_singular_vectors_of_both_sides():
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 10, 3)
    first, later = tucker2(layer, 4, 3, iterations=0).lost, tucker2(layer, 4, 3, iterations=10).lost
    assert later < first
    assert first < 1.0


def test_what_the_weight_property_says_is_what_the_layers_do():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, padding=1)
    new, x = tucker2(layer, 3, 2), torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(new(x), nn.functional.conv2d(x, new.weight, new.bias, padding=1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_gives_the_smallest_ranks_that_keep_it(energy):
    torch.manual_seed(0)
    layer = of_rank(60, 50, 12)
    with torch.no_grad():
        layer.weight += 0.01 * torch.randn(60, 50)
    new = convert_(nn.Sequential(layer), Factor(energy=energy)).model[0]
    rank = new.down.out_features
    assert new.lost <= 1.0 - energy + 1e-6
    assert rank == 1 or low_rank(layer, rank - 1).lost > 1.0 - energy
    conv = nn.Conv2d(16, 16, 3)
    new = convert_(nn.Sequential(conv), Factor(energy=0.6)).model[0]
    assert new.lost <= 2 * 0.4


def test_one_budget_goes_where_least_is_lost():
    torch.manual_seed(0)
    model = nn.Sequential(of_rank(40, 40, 2), nn.ReLU(), nn.Linear(40, 40), nn.Conv2d(20, 20, 3))
    before = sum(m.weight.numel() for m in model if hasattr(m, "weight"))
    least = [80, 80, 20 + 9 + 20]
    for parameters in (sum(least), 2000, 4000, before - 1):
        made = convert_(copy.deepcopy(model), Factor(parameters=parameters)).model
        stored = sum(m.weight.numel() for m in made.modules() if isinstance(m, nn.Linear | nn.Conv2d))
        assert stored <= parameters
        if parameters > 2000:
            assert made[0].down.out_features == 2
            assert made[0].lost < 1e-9
    with pytest.raises(ValueError, match="208 do not hold these layers: the smallest choices take 209"):
        convert_(copy.deepcopy(model), Factor(parameters=208))


@pytest.mark.parametrize("parameters", [600, 1000, 1500])
def test_no_other_ranks_of_as_many_numbers_lose_less(parameters):
    torch.manual_seed(0)
    model = nn.Sequential(of_rank(20, 30, 6), nn.Linear(40, 24))
    with torch.no_grad():
        model[0].weight += 0.5 * torch.randn(20, 30)
    made = convert_(copy.deepcopy(model), Factor(parameters=parameters)).model
    layers = [m for m in made.modules() if isinstance(m, nn.Linear)]
    stored = sum(m.weight.numel() for m in layers)
    lost = sum(m.lost for m in made if isinstance(m, Factored))
    tails = [
        [float(x) for x in (1 - squares.cumsum(0) / squares.sum())]
        for squares in (torch.linalg.svdvals(m.weight.detach().double()).square() for m in model)
    ]
    sizes = [50, 64]
    options = [
        [(m.weight.numel(), 0.0), *(((k + 1) * size, tail) for k, tail in enumerate(own))]
        for m, size, own in zip(model, sizes, tails, strict=True)
    ]
    best = min(a[1] + b[1] for a in options[0] for b in options[1] if a[0] + b[0] <= parameters)
    assert stored <= parameters
    assert lost == pytest.approx(best, abs=1e-6)


def test_what_stays_is_named_with_the_reason():
    torch.manual_seed(0)
    embedding, tied, hooked = nn.Embedding(30, 20), nn.Linear(20, 30, bias=False), nn.Linear(20, 20)
    tied.weight = embedding.weight
    hooked.register_forward_hook(lambda *_: None)
    broken = nn.Linear(20, 20)
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    model = nn.ModuleDict(
        {
            "small": nn.Linear(2, 2),
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "embedding": embedding,
            "tied": tied,
            "hooked": hooked,
            "broken": broken,
            "meta": nn.Linear(20, 20, device="meta"),
            "attention": nn.MultiheadAttention(8, 2),
            "changed": of_rank(20, 20, 2),
        }
    )
    result = convert_(model, Factor(energy=0.9))
    assert list(result.changed) == ["changed"]
    for name, why in {
        "small": "no fewer numbers",
        "grouped": "groups",
        "tied": "tied",
        "hooked": "hooks",
        "broken": "not finite",
        "meta": "meta",
        "attention.out_proj": "not a plain",
    }.items():
        assert why in result.left[name]


def test_bad_ranks_and_options_are_refused():
    for rank in (0, 6, -1):
        with pytest.raises(ValueError, match="from 1 to 5"):
            low_rank(nn.Linear(5, 9), rank)
        with pytest.raises(ValueError, match="from 1 to 5"):
            tucker2(nn.Conv2d(5, 9, 3), rank, 1)
    with pytest.raises(ValueError, match="from 1 to 9"):
        tucker2(nn.Conv2d(5, 9, 3), 1, 10)
    with pytest.raises(ValueError, match="groups"):
        tucker2(nn.Conv2d(4, 4, 3, groups=2), 1, 1)
    with pytest.raises(ValueError, match="groups"):
        low_rank(nn.Conv2d(4, 4, 1, groups=2), 1)
    with pytest.raises(ValueError, match="use tucker2"):
        low_rank(nn.Conv2d(4, 4, 3), 1)
    for options in ({}, {"energy": 0.5, "parameters": 3}, {"energy": 0.0}, {"energy": 1.1}):
        with pytest.raises(ValueError, match="energy"):
            Factor(**options)


def test_a_transformer_layer_runs_in_evaluation_and_what_was_frozen_stays_frozen():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    model.linear1.requires_grad_(False)
    x = torch.randn(2, 5, 16)
    made = convert_(copy.deepcopy(model), Factor(parameters=1500)).model
    assert isinstance(made.linear1, Factored)
    assert not any(p.requires_grad for p in made.linear1.parameters())
    with torch.no_grad():
        fast = made(x)
    torch.testing.assert_close(fast, made(x.requires_grad_()), atol=1e-5, rtol=1e-4)


def test_it_trains_and_loads():
    torch.manual_seed(0)
    model = convert_(nn.Sequential(of_rank(30, 30, 3)), Factor(energy=0.9)).model
    other = convert_(nn.Sequential(of_rank(30, 30, 3)), Factor(parameters=30 * 2 * model[0].down.out_features)).model
    x, optimizer = torch.randn(8, 30), torch.optim.SGD(model.parameters(), lr=0.01)
    before = model(x).square().mean()
    before.backward()
    optimizer.step()
    assert model(x).square().mean() < before
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), copy.deepcopy(model)(x))
