import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from noctule.core.convert import Leave, convert_
from noctule.kernels import IDENTITY, Epilogue, reference
from noctule.sparse.budget import uniform
from noctule.sparse.layers import AllReLU, FuseEpilogue, SparseLinear, ToDense, ToSparse
from noctule.sparse.pattern import largest


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))


LOOKUP = "a lookup: it reads whole rows and multiplies nothing, so sparse weights save nothing"


def total(model: nn.Module) -> int:
    return sum(m.weights for m in model.modules() if isinstance(m, SparseLinear))


class Branches(nn.Module):
    """Nested, with a layer that stands in two places and modules in every kind of container."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.listed = nn.ModuleList([nn.Linear(8, 8), self.shared])
        self.named = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8), nn.ReLU())})

    def forward(self, x):
        return self.named["a"](self.listed[1](self.listed[0](self.again(self.shared(x)))))


# -- convert_ -----------------------------------------------------------------------------------------------------


def test_nested_modules_are_found_and_shared_ones_stay_shared():
    model = Branches()
    done = convert_(model, ToSparse(density=0.5))
    assert done.model is model
    assert set(done.changed) == {"shared", "listed.0", "named.a.0"}
    assert model.shared is model.again
    assert model.shared is model.listed[1]
    assert isinstance(model.shared, SparseLinear)
    assert len(list(model.parameters())) == 6
    assert model(torch.randn(3, 8)).shape == (3, 8)


def test_the_model_itself_can_be_what_is_replaced():
    linear = nn.Linear(8, 4)
    done = convert_(linear, ToSparse(weights=10))
    assert isinstance(done.model, SparseLinear)
    assert done.changed == {"": "Linear -> SparseLinear(8, 4, weights=10 (31.25%), bias=True)"}
    assert str(done).startswith("changed (model): Linear -> SparseLinear")


def test_where_says_what_may_be_looked_at():
    model = mlp()
    done = convert_(model, ToSparse(density=0.5), where=lambda name, module: name != "4")
    assert set(done.changed) == {"0", "2"}
    assert isinstance(model[4], nn.Linear)
    assert total(model) == round(0.5 * (30 * 20 + 20 * 20))


def test_tied_weights_are_left_so_that_the_tie_holds():
    model = mlp()
    model[4] = nn.Linear(20, 20)
    model[4].weight = model[2].weight
    done = convert_(model, ToSparse(density=0.5))
    assert set(done.changed) == {"0"}
    assert done.left == {
        "2": "its weight is tied to 4 (420 numbers, 55.3% of the model)",
        "4": "its weight is tied to 2 (20 numbers, 2.6% of the model)",
    }
    assert model[4].weight is model[2].weight
    assert total(model) == 300


def test_weights_tied_to_another_kind_of_module_are_left_too():
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False), "body": nn.Linear(4, 4)}
    )
    model["head"].weight = model["embedding"].weight
    done = convert_(model, ToSparse(density=0.5))
    assert set(done.changed) == {"body"}
    assert done.left == {
        "embedding": f"{LOOKUP}; its weight is tied to head (36 numbers, 75.0% of the model)",
        "head": "its weight is tied to embedding",
    }


def test_subclasses_and_hooked_layers_are_left_with_the_reason():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(8, 8), *(nn.Linear(8, 8) for _ in range(6)))
    model[1].register_forward_hook(lambda *_: None)
    model[2].register_forward_pre_hook(lambda *_: None)
    model[3].register_full_backward_hook(lambda *_: None)
    model[4].register_full_backward_pre_hook(lambda *_: None)
    done = convert_(model, ToSparse(density=0.5))
    assert set(done.changed) == {"5", "6"}
    assert done.left["0"] == "Special is not a plain nn.Linear (72 numbers, 16.4% of the model)"
    assert all("hooks" in done.left[str(k)] for k in (1, 2, 3, 4))
    assert "left 1: it has hooks" in str(done)


def test_a_call_that_changes_nothing_warns():
    with pytest.warns(UserWarning, match="no module of the kind"):
        assert str(convert_(nn.Sequential(nn.ReLU()), ToSparse(density=0.5))) == "nothing changed"
    with pytest.warns(UserWarning, match="0: Special is not"):
        convert_(nn.Sequential(type("Special", (nn.Linear,), {})(2, 2)), ToSparse(density=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_(mlp(), ToSparse(density=0.5))


def test_a_rule_is_any_function():
    def swap(module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.ReLU):
            return nn.GELU()
        if isinstance(module, nn.Linear) and module.out_features == 4:
            raise Leave("it is the last")
        return None

    done = convert_(mlp(), swap)
    assert done.changed == {"1": "ReLU -> GELU(approximate='none')", "3": "ReLU -> GELU(approximate='none')"}
    assert done.left == {"4": "it is the last"}


def test_the_mode_of_a_replaced_module_is_kept_and_no_others_is_touched():
    model = nn.Sequential(mlp(), nn.Dropout(), nn.BatchNorm1d(4))
    model[0].eval()
    model[2].eval()
    convert_(model, ToSparse(density=0.5))
    assert not model[0][0].training
    convert_(model, FuseEpilogue())
    assert [model.training, model[1].training, model[2].training] == [True, True, False]
    flat = nn.Sequential(SparseLinear(4, 4, density=0.5), nn.ReLU(), nn.BatchNorm1d(4))
    flat[2].eval()  # a frozen norm in a model that trains
    convert_(flat, FuseEpilogue())
    assert not flat[2].training


# -- ToSparse -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [uniform, None])
def test_the_weights_add_up(budget):
    options = {} if budget is None else {"budget": budget}
    for rule, expected in (
        (ToSparse(density=0.1, **options), 108),
        (ToSparse(weights=77, **options), 77),
        (ToSparse(density=1.0, **options), 1080),
        (ToSparse(density=1e-9, **options), 3),
    ):
        model = mlp()
        convert_(model, rule)
        assert total(model) == expected


def test_epsilon_gives_each_layer_its_own():
    model = mlp()
    convert_(model, ToSparse(epsilon=5))
    assert [model[k].weights for k in (0, 2, 4)] == [250, 200, 80]  # the last one is full
    convert_(model := mlp(), ToSparse(epsilon=1e-6))
    assert [model[k].weights for k in (0, 2, 4)] == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_places_go_along():
    model = nn.Sequential(nn.Linear(0, 5), nn.Linear(5, 3))
    convert_(model, ToSparse(density=0.5))
    assert [m.weights for m in model] == [0, 8]
    assert convert_(model[0].to_dense(), ToSparse(density=0.5)).model(torch.zeros(2, 0)).shape == (2, 5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"density": 0.5, "weights": 3},
        {"density": 0.0},
        {"density": 1.1},
        {"density": float("nan")},
        {"epsilon": 0.0},
    ],
)
def test_rules_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=r"how sparse|density|epsilon"):
        ToSparse(**options)


def test_more_weights_than_places_are_refused_and_the_model_stays():
    model = mlp()
    with pytest.raises(ValueError, match="do not fit"):
        convert_(model, ToSparse(weights=2000))
    assert all(type(model[k]) is nn.Linear for k in (0, 2, 4))


def test_the_largest_without_fresh_values_is_magnitude_pruning():
    model = mlp()
    before = copy.deepcopy(model)
    convert_(model, ToSparse(density=0.3, budget=uniform, pattern=largest, fresh=False))
    for k in (0, 2, 4):
        weight = before[k].weight
        threshold = weight.abs().flatten().sort(descending=True).values[model[k].weights - 1]
        assert torch.equal(model[k].to_dense().weight, weight * (weight.abs() >= threshold))
        assert torch.equal(model[k].bias, before[k].bias)


def test_fresh_values_are_scaled_to_the_sparse_fan_in():
    torch.manual_seed(0)
    layer = convert_(nn.Linear(1000, 1000), ToSparse(density=0.01)).model
    assert layer.values.abs().max() <= 10**-0.5
    assert layer.values.abs().max() > 0.99 * 10**-0.5


def test_a_generator_makes_it_repeatable():
    first, again = (
        convert_(mlp(), ToSparse(density=0.2, generator=torch.Generator().manual_seed(3))).model for _ in range(2)
    )
    for k in (0, 2, 4):
        assert first[k].topology == again[k].topology
        assert torch.equal(first[k].values, again[k].values)


def test_dtype_mode_and_what_is_frozen_are_kept():
    linear = nn.Linear(8, 4, dtype=torch.float64).eval()
    linear.weight.requires_grad_(False)
    layer = convert_(linear, ToSparse(density=0.5)).model
    assert layer.values.dtype == layer.bias.dtype == torch.float64
    assert not layer.training
    assert not layer.values.requires_grad
    assert layer.bias.requires_grad
    linear.bias.requires_grad_(False)
    layer = convert_(linear, ToSparse(density=0.5)).model
    assert not layer.bias.requires_grad
    assert not layer.to_dense().bias.requires_grad
    assert convert_(nn.Linear(8, 4, bias=False), ToSparse(density=0.5)).model.bias is None


def test_measure_first_leaves_a_tiny_layer_dense_and_says_why():
    with pytest.warns(UserWarning, match="dense is faster"):
        done = convert_(nn.Sequential(nn.Linear(4, 4)), ToSparse(density=1.0, measure_first=True, batch=2))
    assert done.left["0"].startswith("dense is faster: ")
    assert "at 100.0% of the weights and batch 2" in done.left["0"]


@pytest.mark.parametrize("prepare", [lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.requires_grad_(False)])
def test_measure_first_measures_any_dtype_and_frozen_layers(prepare):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = convert_(prepare(nn.Linear(16, 16)), ToSparse(density=0.5, measure_first=True, batch=4))
    assert set(done.left) | set(done.changed) == {""}


def test_measure_first_makes_a_large_thin_layer_sparse():
    layer = nn.Linear(2000, 2000, bias=False)
    assert set(convert_(layer, ToSparse(density=0.001, measure_first=True, batch=64)).changed) == {""}
    assert layer.weight.grad is None


# -- and back -----------------------------------------------------------------------------------------------------


def test_there_and_back_is_the_identity():
    model = mlp()
    before = copy.deepcopy(model)
    x = torch.randn(7, 30)
    convert_(model, ToSparse(density=1.0, fresh=False))
    assert all(isinstance(model[k], SparseLinear) for k in (0, 2, 4))
    convert_(model, ToDense())
    assert model.state_dict().keys() == before.state_dict().keys()
    for a, b in zip(model.parameters(), before.parameters()):
        assert torch.equal(a, b)
    assert torch.equal(model(x), before(x))


def test_and_forth_again_with_the_zeros_left_out():
    sparse = SparseLinear(30, 20, density=0.2)
    again = SparseLinear.from_dense(convert_(sparse, ToDense()).model)
    assert again.topology == sparse.topology
    assert torch.equal(again.values, sparse.values)
    assert torch.equal(again.bias, sparse.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_fused_comes_back_as_modules(dtype):
    model = nn.Sequential(mlp(), nn.LeakyReLU(0.2), nn.Dropout(0.5)).to(dtype)
    convert_(model, ToSparse(density=0.4))
    convert_(model, FuseEpilogue())
    x = torch.randn(7, 30, dtype=dtype)
    model.eval()
    expected = model(x)
    convert_(model, ToDense())
    assert not any(isinstance(m, SparseLinear) for m in model.modules())
    torch.testing.assert_close(model(x), expected)
    assert not any(m.training for m in model.modules())


def test_hooks_are_not_lost_on_the_way_back():
    model = nn.Sequential(SparseLinear(4, 4, density=0.5))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hooks"):
        assert "hooks" in convert_(model, ToDense()).left["0"]


# -- FuseEpilogue -------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "none": None,
    "relu": nn.ReLU(),
    "inplace": nn.ReLU(inplace=True),
    "leaky": nn.LeakyReLU(0.2),
    "all-relu 1": AllReLU(0.6, layer=1),
    "all-relu 2": AllReLU(0.6, layer=2),
}


def sparse_block(activation: str, p: float, bias: bool = True) -> nn.Sequential:
    module = ACTIVATIONS[activation]
    modules = [SparseLinear(30, 20, density=0.3, bias=bias)]
    modules += [] if module is None else [copy.deepcopy(module)]
    return nn.Sequential(*modules, *([nn.Dropout(p)] if p else []))


@pytest.mark.parametrize(
    ("activation", "p"), [c for c in itertools.product(ACTIVATIONS, [0.0, 0.4]) if c != ("none", 0.0)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_fused_is_unfused(activation, p, bias):
    model = sparse_block(activation, p, bias)
    fused = convert_(copy.deepcopy(model), FuseEpilogue()).model
    slope = getattr(model[1], "negative_slope", 0.0 if "relu" in activation or activation == "inplace" else 1.0)
    assert fused[0].epilogue == Epilogue(slope, p)
    assert all(type(m) is nn.Identity for m in fused[1:])
    x = torch.randn(7, 30)
    assert torch.equal(fused.eval()(x), model.eval()(x))
    # In training, the fused layer drops what the counter-based words of its seed say.
    fused.train()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(5)
    y = fused(a)
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ())) if p else 0
    keep = reference.random_words(seed, 20, 7).t() >= Epilogue(dropout=p).drop_below
    expected = (model[:-1] if p else model)(b) * keep / (1 - p)
    torch.testing.assert_close(y, expected)
    dy = torch.randn(7, 20)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(a.grad, b.grad)
    for ours, theirs in zip(fused.parameters(), model.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_dropout_draws_anew_each_time_and_follows_the_seed():
    model = convert_(sparse_block("relu", 0.5), FuseEpilogue()).model
    x = torch.randn(50, 30)
    torch.manual_seed(3)
    first, second = model(x), model(x)
    torch.manual_seed(3)
    assert torch.equal(first, model(x))
    assert not torch.equal(first, second)


def test_names_stay_and_a_second_time_finds_nothing():
    model = nn.Sequential(mlp(), nn.Sequential(nn.ReLU(), nn.Dropout(0.1)))
    convert_(model, ToSparse(density=0.5))
    before = list(model.state_dict())
    done = convert_(model, FuseEpilogue())
    assert done.changed == {"0": "Sequential changed"}
    assert list(model.state_dict()) == before
    assert model[0][0].epilogue == Epilogue(0.0)
    assert model[0][4].epilogue == IDENTITY
    with pytest.warns(UserWarning, match="changed nothing"):
        convert_(model, FuseEpilogue())


def test_only_what_follows_directly_is_folded():
    model = nn.Sequential(
        SparseLinear(8, 8, density=0.5), nn.Dropout(0.1), nn.ReLU(),
        SparseLinear(8, 8, density=0.5), nn.LayerNorm(8), nn.ReLU(),
        nn.Linear(8, 8), nn.ReLU(),
        SparseLinear(8, 8, density=0.5), nn.GELU(),
        SparseLinear(8, 8, density=0.5), nn.ReLU(), nn.ReLU(),
        SparseLinear(8, 8, density=0.5), nn.Dropout(1.0),
    )  # fmt: skip
    convert_(model, FuseEpilogue())
    kinds = [type(m).__name__ for m in model]
    assert kinds == [
        "SparseLinear", "Identity", "ReLU", "SparseLinear", "LayerNorm", "ReLU", "Linear", "ReLU",
        "SparseLinear", "GELU", "SparseLinear", "Identity", "ReLU", "SparseLinear", "Dropout",
    ]  # fmt: skip
    assert model[0].epilogue == Epilogue(1.0, 0.1)


@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_what_someone_listens_to_is_left_alone(register):
    for at in (0, 1, 2):
        model = sparse_block("relu", 0.5)
        getattr(model[at], f"register_{register}_hook")(lambda *_: None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert_(model, FuseEpilogue())
        assert not isinstance(model[at], nn.Identity)
        assert model[0].epilogue == {0: IDENTITY, 1: IDENTITY, 2: Epilogue(0.0)}[at]


def test_a_layer_in_two_places_is_left_since_only_one_may_have_a_relu():
    layer, x = SparseLinear(8, 8, density=0.5), torch.randn(3, 8)
    once, twice = nn.Sequential(layer, nn.ReLU()), nn.Sequential(layer, nn.ReLU(), layer)
    for model in (twice, nn.ModuleList([once, nn.Sequential(layer)]), nn.ModuleDict({"block": once, "alone": layer})):
        with pytest.warns(UserWarning, match="changed nothing"):
            convert_(model, FuseEpilogue())
    assert torch.equal(twice(x), layer(torch.relu(layer(x))))


def test_a_shared_activation_is_folded_everywhere():
    relu = nn.ReLU()
    model = nn.Sequential(SparseLinear(8, 8, density=0.5), relu, SparseLinear(8, 8, density=0.5), relu)
    x = torch.randn(3, 8)
    expected = model(x)
    convert_(model, FuseEpilogue())
    assert torch.equal(model(x), expected)
    assert [type(m) for m in model] == [SparseLinear, nn.Identity, SparseLinear, nn.Identity]
