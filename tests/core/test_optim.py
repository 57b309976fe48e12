import copy
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from noctule.core.optim import carry_state, check_carry, param_groups, sparse_layers
from noctule.core.remap import Remap, resize_full
from noctule.core.topology import Topology

RECIPES = {
    "sgd": (SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "sgd dampened": (SGD, {"momentum": 0.9, "dampening": 0.5}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (Adam, {"weight_decay": 0.01}),
    "adamw": (AdamW, {"weight_decay": 0.1}),
    "adamw amsgrad": (AdamW, {"amsgrad": True}),
    "adagrad": (Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "rmsprop": (RMSprop, {"centered": True, "momentum": 0.9}),
    "nadam": (NAdam, {}),
    "radam": (RAdam, {}),
    "adadelta": (Adadelta, {}),
    "adamax": (Adamax, {}),
    "asgd": (ASGD, {"t0": 1}),
    "rprop": (Rprop, {}),
}
FUSED = (SGD, Adam, AdamW, Adagrad)
FORMS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
CASES = [
    pytest.param(kind, {"lr": 0.05, **options, **form}, id=f"{name}-{form_name}")
    for name, (kind, options) in RECIPES.items()
    for form_name, form in FORMS.items()
    if form_name != "fused" or kind in FUSED
]
SECOND = {"exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg", "acc_delta", "exp_inf", "step_size"}
FIRST = {"momentum_buffer", "exp_avg", "grad_avg", "ax", "prev"}
COUNTERS = {"step", "mu_product", "eta", "mu"}

all_optimizers = pytest.mark.parametrize(("kind", "options"), CASES)


class SparseStandIn(nn.Module):
    def __init__(self, weights: int = 4, *, out_features: int = 3, in_features: int = 3) -> None:
        super().__init__()
        self.topology = Topology.random((out_features, in_features), weights)
        self.values = nn.Parameter(torch.randn(weights))
        self.bias = nn.Parameter(torch.zeros(out_features))


def numbers(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def trained(kind, options, *, weights: int, steps: int = 3) -> tuple[nn.Parameter, Optimizer]:
    values = nn.Parameter(numbers(weights, 0))
    optimizer = kind([values], **options)
    for seed in range(1, steps + 1):
        step(optimizer, values, numbers(weights, seed))
    return values, optimizer


def step(optimizer: Optimizer, values: Tensor, gradient: Tensor) -> None:
    values.grad = gradient.clone()
    optimizer.step()
    values.grad = None


def change(optimizer: Optimizer, values: nn.Parameter, remap: Remap) -> nn.Parameter:
    """What a layer does: move the values, in place if their number stays; then carry."""
    moved = remap.apply(values.detach())
    new = values if remap.new_size == remap.old_size else nn.Parameter(moved)
    with torch.no_grad():
        new.copy_(moved)
    carry_state(optimizer, values, new, remap)
    return new


def remap_of(slots: list[int], old_size: int) -> Remap:
    return Remap(torch.tensor(slots, dtype=torch.int64), old_size)


def snapshot(optimizer: Optimizer, values: Tensor) -> dict:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state.get(values, {}).items()}


def assert_same_state(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])), key


# ---- groups


def test_sparse_values_and_matrices_decay_and_the_rest_does_not():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "conv": nn.Conv2d(1, 2, 3),
            "sparse": SparseStandIn(),
            "batch": nn.BatchNorm2d(2),
            "norm": nn.LayerNorm([2, 4, 4]),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
        }
    )
    model.scale = nn.Parameter(torch.ones(()))
    decayed, plain = param_groups(model, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert {names[id(p)] for p in decayed["params"]} == {
        "embed.weight",
        "conv.weight",
        "sparse.values",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_without_a_number_the_optimizer_decides_and_values_really_decay():
    model = SparseStandIn()
    model.bias.data.fill_(1.0)
    before = model.values.detach().clone()
    optimizer = AdamW(param_groups(model), lr=0.5, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(model.values, before * 0.95)
    assert torch.equal(model.bias, torch.ones(3))


def test_tied_once_frozen_never():
    model = nn.Module()
    model.one, model.two, model.sparse = nn.Linear(3, 3), nn.Linear(3, 3), SparseStandIn()
    model.alias = model.sparse.values
    model.two.weight = model.one.weight
    model.two.bias.requires_grad_(False)
    decayed, plain = param_groups(model)
    assert [id(p) for p in decayed["params"]] == [id(model.sparse.values), id(model.one.weight)]
    assert [id(p) for p in plain["params"]] == [id(model.one.bias), id(model.sparse.bias)]


def test_a_group_may_be_empty_and_a_model_may_not():
    linear = nn.Linear(2, 2, bias=False)
    optimizer = AdamW(param_groups(linear))
    linear(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="ReLU has no trainable parameter"):
        param_groups(nn.ReLU())
    for decay in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight_decay must be a finite number"):
            param_groups(linear, weight_decay=decay)


def test_wrappers_do_not_show_a_layer_twice():
    layer = SparseStandIn()
    model = torch.compile(nn.Sequential(torch.compile(layer), layer))
    assert [id(found) for found in sparse_layers(model).values()] == [id(layer)]
    assert [len(group["params"]) for group in param_groups(model)] == [1, 1]


# ---- state


@all_optimizers
@pytest.mark.parametrize("weights", [1, 37, 64])
def test_permuting_then_stepping_is_stepping_then_permuting(kind, options, weights):
    remap = Remap(torch.randperm(weights, generator=torch.Generator().manual_seed(9)), weights)
    gradient = numbers(weights, 77)

    values, optimizer = trained(kind, options, weights=weights)
    change(optimizer, values, remap)
    step(optimizer, values, remap.apply(gradient))

    expected, other = trained(kind, options, weights=weights)
    step(other, expected, gradient)
    change(other, expected, remap)

    if weights == 37:  # torch rounds the rest that fills no vector register in another way than what fills one
        torch.testing.assert_close(
            [values, *snapshot(optimizer, values).values()], [expected, *snapshot(other, expected).values()]
        )
    else:
        assert torch.equal(values, expected)
        assert_same_state(snapshot(optimizer, values), snapshot(other, expected))


@all_optimizers
@pytest.mark.parametrize("steps", [0, 2])
def test_the_identity_changes_nothing_and_keeps_every_tensor(kind, options, steps):
    values, optimizer = trained(kind, options, weights=9, steps=steps)
    before, tensors = snapshot(optimizer, values), dict(optimizer.state.get(values, {}))
    assert change(optimizer, values, remap_of(list(range(9)), 9)) is values
    assert_same_state(before, snapshot(optimizer, values))
    assert all(optimizer.state[values][key] is tensor for key, tensor in tensors.items())


@all_optimizers
def test_moved_connections_start_neutral_and_the_tensors_stay_the_same_objects(kind, options):
    values, optimizer = trained(kind, options, weights=5)
    before, tensors = snapshot(optimizer, values), dict(optimizer.state[values])
    assert tensors
    change(optimizer, values, remap_of([4, -1, 0, 1, -1], 5))
    for key, tensor in tensors.items():
        assert optimizer.state[values][key] is tensor
        if key in COUNTERS:
            assert torch.equal(tensor, before[key])
        else:
            assert torch.equal(tensor[[0, 2, 3]], before[key][[4, 0, 1]])
            neutral = before[key][[4, 0, 1]].mean() if key in SECOND else torch.tensor(0.0)
            assert key in SECOND | FIRST
            assert torch.equal(tensor[[1, 4]], neutral.repeat(2))
    step(optimizer, values, numbers(5, 5))
    assert values.isfinite().all()


@all_optimizers
@pytest.mark.parametrize("slots", [[2, 0, -1], [3, -1, 2, 1, 0, -1, -1], [], [-1, -1]])
@pytest.mark.parametrize("steps", [0, 2])
def test_another_number_of_weights_swaps_the_parameter(kind, options, slots, steps):
    values, optimizer = trained(kind, options, weights=4, steps=steps)
    other = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [other], "lr": 0.25})
    before = snapshot(optimizer, values)
    new = change(optimizer, values, remap_of(slots, 4))
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [[id(new)], [id(other)]]
    assert values not in optimizer.state
    for key, old in before.items():
        now = optimizer.state[new][key]
        if key in COUNTERS:
            assert torch.equal(now, old)
        else:
            assert (now.shape, now.dtype) == (new.shape, old.dtype)
            assert now.isfinite().all()
    step(optimizer, new, torch.ones(len(slots)))
    assert new.isfinite().all()

    resumed_values = nn.Parameter(new.detach().clone())
    resumed = kind([resumed_values], **options)
    resumed.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else the two share their tensors
    for one, values_of in ((optimizer, new), (resumed, resumed_values)):
        step(one, values_of, torch.full((len(slots),), 0.5))
    assert torch.equal(new, resumed_values)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), old_size=st.integers(0, 12), new_size=st.integers(0, 12))
def test_survivors_keep_their_own_state_whatever_the_remap(data, old_size, new_size):
    kept = data.draw(st.lists(st.integers(0, max(old_size - 1, 0)), unique=True, max_size=min(old_size, new_size)))
    slots = data.draw(st.permutations([*kept, *[-1] * (new_size - len(kept))] if old_size else [-1] * new_size))
    values, optimizer = trained(Adam, {}, weights=old_size, steps=2)
    before = snapshot(optimizer, values)
    new = change(optimizer, values, remap_of(slots, old_size))
    for key in ("exp_avg", "exp_avg_sq"):
        now = optimizer.state[new][key]
        survivors = before[key][[slot for slot in slots if slot >= 0]]
        neutral = (survivors if len(survivors) else before[key]).mean() if key == "exp_avg_sq" and old_size else 0.0
        for slot, value in zip(slots, now, strict=True):
            assert value == (before[key][slot] if slot >= 0 else neutral)


def test_without_state_only_the_group_follows():
    values = nn.Parameter(torch.ones(3))
    optimizer = Adam([values])
    new = change(optimizer, values, remap_of([2, -1], 3))
    assert not optimizer.state
    assert optimizer.param_groups[0]["params"][0] is new


def test_a_single_weight_is_not_taken_for_a_counter_nor_a_counter_for_it():
    for kind in (Adam, NAdam, ASGD):
        values, optimizer = trained(kind, {}, weights=1)
        before = snapshot(optimizer, values)
        change(optimizer, values, remap_of([-1], 1))
        state = optimizer.state[values]
        assert all(torch.equal(state[key], before[key]) for key in COUNTERS & state.keys())
        assert all(state[key].item() == 0.0 for key in FIRST & state.keys())
    values, optimizer = trained(Adam, {}, weights=1)
    optimizer.state[values]["step"] = torch.tensor([7.0])  # as some optimizers elsewhere keep it
    new = change(optimizer, values, remap_of([0, -1], 1))
    assert optimizer.state[new]["step"].tolist() == [7.0]


def test_unknown_state_goes_by_its_signs():
    values, optimizer = trained(SGD, {"lr": 0.1}, weights=3)
    optimizer.state[values] = {
        "curvature": torch.tensor([1.0, 2.0, 6.0]),
        "drift": torch.tensor([1.0, -2.0, 6.0]),
        "age": torch.tensor([4, 5, 6]),
        "seen": torch.tensor([True, True, False]),
        "bfloat": torch.tensor([1.0, 2.0, 6.0], dtype=torch.bfloat16),
        "scale": torch.tensor([3.0]),
        "note": "kept",
        "nothing": None,
        "list": [1, 2],
    }
    new = change(optimizer, values, remap_of([2, -1], 3))
    state = optimizer.state[new]
    assert {key: value.tolist() if isinstance(value, Tensor) else value for key, value in state.items()} == {
        "curvature": [6.0, 6.0],
        "drift": [6.0, 0.0],
        "age": [6, 0],
        "seen": [False, False],
        "bfloat": [6.0, 6.0],
        "scale": [3.0],
        "note": "kept",
        "nothing": None,
        "list": [1, 2],
    }
    assert (state["age"].dtype, state["seen"].dtype, state["bfloat"].dtype) == (torch.int64, torch.bool, torch.bfloat16)


def test_adafactor_keeps_one_number_per_weight_of_a_vector_and_follows():
    values, optimizer = trained(Adafactor, {}, weights=4)
    before = snapshot(optimizer, values)["variance"]
    new = change(optimizer, values, remap_of([3, -1], 4))
    assert torch.equal(optimizer.state[new]["variance"], before[3].repeat(2))


# ---- refusals


class Blocks(Tensor):
    """State in a form of its own, as quantising optimizers keep it."""


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"row": torch.zeros(2)}, r"'row' .* of shape \(2,\) for 4 weights"),
        ({"square": torch.zeros(4, 4)}, r"'square' .* of shape \(4, 4\) for 4 weights"),
        ({"exp_avg": torch.zeros(4).as_subclass(Blocks)}, "'exp_avg' .* a Blocks, not a plain tensor"),
        ({"history": [torch.zeros(4)]}, "'history' .* tensors inside a list"),
        ({"nest": {"deep": [(torch.zeros(1),)]}}, "'nest' .* tensors inside a dict"),
    ],
)
def test_state_of_another_shape_is_refused_before_anything_changed_anywhere(state, reason):
    values = nn.Parameter(torch.arange(4.0))
    good, bad = Adam([values]), SGD([values], lr=0.1)
    values.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    good.step()
    bad.state[values] = state
    before, kept = snapshot(good, values), copy.copy(state)
    new = nn.Parameter(torch.zeros(2))
    for attempt in (
        lambda: check_carry([good, bad], values),
        lambda: carry_state([good, bad], values, new, remap_of([3, 1], 4)),
        lambda: carry_state([good, bad], values, values, remap_of([3, 2, 1, 0], 4)),
    ):
        with pytest.raises(ValueError, match=f"SGD keeps {reason}: it cannot follow.*Use an optimizer"):
            attempt()
        assert_same_state(before, snapshot(good, values))
        assert all(p is values for o in (good, bad) for g in o.param_groups for p in g["params"])
        assert bad.state[values] == kept
        assert values.grad.tolist() == [1.0, 2.0, 3.0, 4.0]
    bad.state.pop(values)  # the remedy in the message
    carry_state([good, bad], values, new, remap_of([3, 1], 4))


@pytest.mark.parametrize("steps", [0, 1])
def test_lbfgs_is_refused_with_the_reason(steps):
    values = nn.Parameter(torch.ones(3))
    optimizer = LBFGS([values])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (values**2).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    with pytest.raises(ValueError, match=r"LBFGS keeps a history over all weights together.*SGD or AdamW"):
        check_carry(optimizer, values)
    check_carry(optimizer, nn.Parameter(torch.ones(3)))  # not its own


def test_sizes_that_do_not_match_are_refused():
    values, optimizer = trained(Adam, {}, weights=3)
    before = snapshot(optimizer, values)
    for new, remap in (
        (nn.Parameter(torch.ones(2)), remap_of([0, 1, 2], 3)),
        (values, remap_of([0, 1, 2, 3], 4)),
    ):
        with pytest.raises(ValueError, match="the remap leads from"):
            carry_state(optimizer, values, new, remap)
    assert_same_state(before, snapshot(optimizer, values))


def test_an_optimizer_that_does_not_know_the_weights_is_left_alone():
    values, stranger = nn.Parameter(torch.ones(3)), Adam([nn.Parameter(torch.ones(3))])
    change(stranger, values, remap_of([0, -1], 3))
    assert stranger.state == defaultdict(dict)


# ---- matrices


def trained_matrix(kind, options, *, steps: int = 3) -> tuple[nn.Parameter, Optimizer]:
    weight = nn.Parameter(numbers(8 * 8, 0).view(8, 8))
    optimizer = kind([weight], **options)
    for seed in range(1, steps + 1):
        step(optimizer, weight, numbers(8 * 8, seed).view(8, 8))
    return weight, optimizer


@all_optimizers
@pytest.mark.parametrize("steps", [0, 2])
def test_the_state_of_a_matrix_follows_its_rows_and_columns(kind, options, steps):
    weight, optimizer = trained_matrix(kind, options, steps=steps)
    before = snapshot(optimizer, weight)
    rows, columns = torch.tensor([0, 3, 4, 7]), torch.tensor([5, 1])
    smaller = nn.Parameter(weight.detach()[rows][:, columns])
    carry_state(optimizer, weight, smaller, resize_full((8, 8), rows=rows, columns=columns))
    assert optimizer.param_groups[0]["params"][0] is smaller
    assert weight not in optimizer.state
    after = snapshot(optimizer, smaller)
    assert after.keys() == before.keys()
    for key, state in before.items():
        expected = state if key in COUNTERS else state[rows][:, columns]
        assert torch.equal(after[key], expected)

    gradient = numbers(8 * 8, 77).view(8, 8)
    step(optimizer, smaller, gradient[rows][:, columns])
    step(other := trained_matrix(kind, options, steps=steps)[1], whole := other.param_groups[0]["params"][0], gradient)
    torch.testing.assert_close(smaller, whole.detach()[rows][:, columns])


def test_state_by_rows_and_columns_cannot_follow_a_matrix():
    weight, optimizer = trained_matrix(Adafactor, {})
    with pytest.raises(ValueError, match=r"Adafactor keeps 'row_var' .* of shape \(8, 1\) for 64 weights"):
        check_carry(optimizer, weight)


def test_state_that_was_loaded_before_the_model_is_told():
    values, optimizer = trained(SGD, {"lr": 0.1, "momentum": 0.9}, weights=3)
    _, smaller = trained(SGD, {"lr": 0.1, "momentum": 0.9}, weights=2)
    optimizer.load_state_dict(smaller.state_dict())
    with pytest.raises(ValueError, match="load the model of a checkpoint before its optimizer"):
        check_carry(optimizer, values)
