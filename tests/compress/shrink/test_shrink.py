"""Removed neurons are gone from everything, and what is left computes what it did."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, Adafactor, Adam, AdamW

from noctule.compress.shrink import shrink
from noctule.core.convert import convert_
from noctule.core.method import Method, attach
from noctule.core.optim import param_groups
from noctule.core.remap import resize
from noctule.kernels import Epilogue
from noctule.sparse.layers import AllReLU, FuseEpilogue, SparseConv2d, SparseLayer, SparseLinear, ToSparse

laws = settings(max_examples=40, deadline=None, derandomize=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lively(model: nn.Module) -> nn.Module:
    """Norms with statistics, scales and shifts of their own, biases that are not zero; float64, evaluation mode."""
    for module in model.modules():
        norm = isinstance(module, nn.PReLU | nn.modules.batchnorm._BatchNorm)
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and (norm or name == "bias"):
                tensor.data.uniform_(0.2, 1.5)
    return model.double().eval()


def linear_chain(kind: str = "sparse", after: str = "relu", *, bias: bool = True) -> nn.Sequential:
    """9 -> 8 -> 6 -> 4."""
    between = {
        "relu": lambda n: [nn.ReLU()],
        "in place": lambda n: [nn.ReLU(inplace=True)],
        "nothing": lambda n: [],
        "sigmoid and dropout": lambda n: [nn.Sigmoid(), nn.Dropout(0.5)],
        "norm": lambda n: [nn.BatchNorm1d(n), nn.LeakyReLU(0.3)],
        "norm without statistics": lambda n: [nn.BatchNorm1d(n, track_running_stats=False), nn.GELU()],
        "norm without scale": lambda n: [nn.Tanh(), nn.BatchNorm1d(n, affine=False)],
        "prelu": lambda n: [nn.Identity(), nn.PReLU(n), nn.Flatten()],
        "one prelu": lambda n: [nn.PReLU(), nn.AlphaDropout(0.2)],
        "all relu": lambda n: [AllReLU(0.6, layer=1)],
        "nested": lambda n: [nn.Sequential(nn.Sequential(nn.ELU()), nn.BatchNorm1d(n))],
    }[after]

    def linear(into: int, out: int) -> nn.Module:
        if kind == "dense":
            return nn.Linear(into, out, bias=bias)
        return SparseLinear(into, out, density=0.6, bias=bias)

    return lively(nn.Sequential(linear(9, 8), *between(8), linear(8, 6), *between(6), linear(6, 4)))


AFTER = [
    *("relu", "in place", "nothing", "sigmoid and dropout", "norm", "norm without statistics", "norm without scale"),
    *("prelu", "one prelu", "all relu", "nested"),
]


def conv_chain(kind: str = "sparse") -> nn.Sequential:
    """3 -> 6 -> 4 channels of 11 x 11 pixels -> 5, the second convolution without padding."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2),
        nn.Conv2d(6, 4, (3, 2), bias=False),
        nn.BatchNorm2d(4),
        nn.PReLU(4),
        nn.MaxPool2d(2),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.BatchNorm1d(4 * 2 * 2),
        nn.Linear(4 * 2 * 2, 5),
    )
    if kind == "sparse":
        convert_(model, ToSparse(density=0.7))
    return lively(model)


def names_of(model: nn.Module) -> list[str]:
    kinds = (SparseLayer, nn.Linear, nn.Conv2d)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@torch.no_grad()
def without_incoming(model: nn.Module, name: str, removed: Tensor) -> nn.Module:
    """A copy in which these neurons (a mask) have no incoming weights, though they are there."""
    twin = copy.deepcopy(model)
    layer = twin.get_submodule(name)
    if isinstance(layer, SparseLayer):
        layer.values[removed[layer.topology.rows()]] = 0.0
    else:
        layer.weight[removed] = 0.0
    return twin


def snapshot(*things) -> list:
    """Everything that a refusal must leave as it is."""
    found = []
    for thing in things:
        if isinstance(thing, nn.Module):
            found += [(name, id(p), p.detach().clone()) for name, p in thing.named_parameters()]
            found += [(name, 0, b.clone()) for name, b in thing.named_buffers()]
            found += [str(thing)]
        else:
            found += [[id(p) for p in group["params"]] for group in thing.param_groups]
            found += [
                (id(p), key, x.clone()) for p, s in thing.state.items() for key, x in s.items() if isinstance(x, Tensor)
            ]
    return found


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        x == y if not isinstance(x, tuple) else x[:2] == y[:2] and torch.equal(x[2].nan_to_num(), y[2].nan_to_num())
        for x, y in zip(a, b, strict=True)
    )


some = st.sets(st.integers(0, 3), max_size=3)  # of the smallest layer, so that one stays in every layer


# -- the function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("after", AFTER)
@given(gone=some, which=st.integers(0, 1), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_removing_is_cutting_the_incoming_weights(kind, after, gone, which, seed):
    torch.manual_seed(seed)
    model = linear_chain(kind, after)
    name = names_of(model)[which]
    neurons = (8, 6)[which]
    removed = torch.zeros(neurons, dtype=torch.bool)
    removed[list(gone)] = True
    x = torch.randn(5, 9, dtype=torch.float64)
    expected = without_incoming(model, name, removed)(x)
    assert shrink(model, {name: ~removed}) == ({name: len(gone)} if gone else {})
    torch.testing.assert_close(model(x), expected)
    layer, reader = (model.get_submodule(n) for n in names_of(model)[which : which + 2])
    assert layer.out_features == reader.in_features == neurons - len(gone)
    assert layer.bias.shape == (neurons - len(gone),)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("after", AFTER)
@given(gone=st.lists(some, min_size=2, max_size=2), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_removing_dead_neurons_leaves_the_function_as_it_is(kind, after, gone, seed):
    torch.manual_seed(seed)
    model, x = linear_chain(kind, after), torch.randn(5, 9, dtype=torch.float64)
    masks = {}
    for name, neurons, which in zip(names_of(model), (8, 6), gone, strict=False):
        masks[name] = torch.zeros(neurons, dtype=torch.bool)
        masks[name][list(which)] = True
        model = without_incoming(model, name, masks[name])
    expected = model(x)
    shrink(model, {name: ~mask for name, mask in masks.items()})
    torch.testing.assert_close(model(x), expected)
    for name, mask in masks.items():
        assert model.get_submodule(name).out_features == int((~mask).sum())


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@given(gone=some, which=st.integers(0, 1), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_channels_go_through_norms_pools_and_flattening(kind, gone, which, seed):
    torch.manual_seed(seed)
    model, x = conv_chain(kind), torch.randn(4, 3, 11, 11, dtype=torch.float64)
    name, channels = (("0", 6), ("3", 4))[which]
    removed = torch.zeros(channels, dtype=torch.bool)
    removed[list(gone)] = True
    expected = without_incoming(model, name, removed)(x)
    shrink(model, {name: ~removed})
    torch.testing.assert_close(model(x), expected)
    left = channels - len(gone)
    assert model.get_submodule(name).out_channels == left
    if which:
        assert model[4].num_features == model[5].num_parameters == left
        assert model[9].num_features == model[10].in_features == 4 * left
        assert model[9].running_var.shape == (4 * left,)
    else:
        assert model[3].in_channels == model[1].num_features == left
    model.train()(x).sum().backward()  # batch statistics too have the new widths


@given(gone=st.lists(some, min_size=2, max_size=2), seed=st.integers(0, 99))
@laws
def test_removing_from_two_layers_is_removing_from_one_after_the_other(gone, seed):
    torch.manual_seed(seed)
    model, x = linear_chain("sparse", "norm"), torch.randn(5, 9, dtype=torch.float64)
    keep = {
        name: torch.tensor([k for k in range(neurons) if k not in which])
        for name, neurons, which in zip(names_of(model), (8, 6), gone, strict=False)
    }
    at_once, front_first = copy.deepcopy(model), copy.deepcopy(model)
    shrink(at_once, dict(reversed(keep.items())))
    for name, kept in keep.items():
        shrink(front_first, {name: kept})
    torch.testing.assert_close(at_once(x), front_first(x))
    assert str(at_once) == str(front_first)
    for a, b in zip(at_once.modules(), front_first.modules(), strict=True):
        if isinstance(a, SparseLayer):
            assert a.topology == b.topology


def test_behind_a_border_of_zeros_the_inside_is_exact():
    torch.manual_seed(0)
    model = lively(nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), SparseConv2d(4, 3, 3, padding=1, density=0.8)))
    removed = torch.tensor([False, True, False, True])
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    expected = without_incoming(model, "0", removed)(x)
    shrink(model, {"0": ~removed})
    torch.testing.assert_close(model(x)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
    assert not torch.allclose(model(x), expected)


def test_a_folded_epilogue_stays_and_its_activation_counts():
    torch.manual_seed(0)
    model = nn.Sequential(
        SparseLinear(9, 8, density=0.6), nn.LeakyReLU(-0.5), nn.Dropout(0.4), SparseLinear(8, 4, density=0.6)
    )
    with torch.no_grad():
        model[0].bias.uniform_(-2.0, -1.0)
    plain = copy.deepcopy(model).eval()
    convert_(model, FuseEpilogue())
    removed = torch.arange(8) % 3 == 0
    expected = without_incoming(plain, "0", removed)
    x = torch.randn(5, 9)
    shrink(model, {"0": ~removed})
    assert model[0].epilogue == Epilogue(-0.5, 0.4)
    torch.testing.assert_close(model.eval()(x), expected(x))


@pytest.mark.parametrize("between", [[], [nn.Identity()]])
def test_a_reader_without_bias_says_it_through_the_norm_behind_it(between):
    torch.manual_seed(0)
    model = lively(
        nn.Sequential(
            nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4, bias=False), *between, nn.BatchNorm1d(4), nn.Linear(4, 2)
        )
    )
    removed = torch.arange(6) < 3
    x = torch.randn(7, 5, dtype=torch.float64)
    expected = without_incoming(model, "0", removed)(x)
    shrink(model, {"0": ~removed})
    torch.testing.assert_close(model(x), expected)


def test_a_norm_behind_an_activation_cannot_say_it():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(5, 6), nn.ReLU(), SparseLinear(6, 4, density=0.8, bias=False), nn.ReLU()),
        *(nn.BatchNorm1d(4), nn.Linear(4, 2)),
    )
    nn.init.ones_(model[0].bias)
    for network in (model, convert_(copy.deepcopy(model), FuseEpilogue()).model):
        before = snapshot(network)
        with pytest.raises(ValueError, match="2 would have to add"):
            shrink(network, {"0": torch.arange(3)})
        assert same(before, snapshot(network))


def test_without_biases_nothing_is_to_be_said():
    torch.manual_seed(0)
    model, x = linear_chain("sparse", "relu", bias=False), torch.randn(5, 9, dtype=torch.float64)
    removed = torch.arange(8) < 3
    expected = without_incoming(model, "0", removed)(x)
    shrink(model, {"0": ~removed})
    torch.testing.assert_close(model(x), expected)


def test_the_mode_and_what_is_frozen_stay():
    model = linear_chain("dense", "norm").train()
    model[0].weight.requires_grad_(False)
    mean = model[1].running_mean.clone()
    shrink(model, {"0": torch.tensor([1, 5])})
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model[0].parameters()] == [False, True]
    assert torch.equal(model[1].running_mean, mean[[1, 5]])


# -- state --------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "momentum": lambda groups: SGD(groups, lr=0.05, momentum=0.9),
    "adam": lambda groups: Adam(groups, lr=0.01),
    "adamw fused": lambda groups: AdamW(groups, lr=0.01, fused=True),
    "adamw foreach": lambda groups: AdamW(groups, lr=0.01, foreach=True, amsgrad=True),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def steps(model: nn.Module, optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        optimizer.zero_grad()
        x = torch.randn(16, 9, generator=seeded(number), dtype=torch.float64)
        (model(x) - x[:, :4]).pow(2).mean().backward()
        optimizer.step()


@torch.no_grad()
def isolate(model: nn.Module, removed: dict[str, Tensor]) -> None:
    """Neurons that are there but say nothing and hear nothing, and so will stay for good."""
    names = names_of(model)
    for name, mask in removed.items():
        layer, reader = model.get_submodule(name), model.get_submodule(names[names.index(name) + 1])
        layer.bias[mask] = 0.0
        for part, side in ((layer, 0), (reader, 1)):
            if isinstance(part, SparseLayer):
                kept = torch.arange(part.topology.shape[side])[~mask]
                lines = torch.where(~mask, torch.arange(mask.numel()), -1)
                part.remap_(*resize(part.topology, **{("rows", "columns")[side]: lines}))
                assert kept.numel() < lines.numel()
            else:
                part.weight.transpose(0, side)[mask] = 0.0


@optimizers
@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("session", [True, False])
def test_training_goes_on_as_if_the_neurons_had_never_been_there(make, kind, session):
    torch.manual_seed(0)
    removed = {"0": torch.arange(8) % 2 == 1, "2": torch.arange(6) > 3}
    model = linear_chain(kind).train()
    isolate(model, removed)
    whole = copy.deepcopy(model)
    optimizer = make(param_groups(model))
    keep = {name: ~mask for name, mask in removed.items()}
    if session:
        with attach(model, optimizer, Method()):
            steps(model, optimizer, 0, 4)
            shrink(model, keep)
            steps(model, optimizer, 4, 8)
    else:
        steps(model, optimizer, 0, 4)
        shrink(model, keep, optimizers=[optimizer])
        steps(model, optimizer, 4, 8)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert set(optimizer.state) == set(model.parameters())

    other = make(param_groups(whole))
    steps(whole, other, 0, 8)
    shrink(whole, keep)
    x = torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(model(x), whole(x))
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@optimizers
def test_parameters_keep_their_groups_and_their_places_in_them(make):
    torch.manual_seed(0)
    model = conv_chain("sparse").train()
    optimizer = make(param_groups(model, weight_decay=0.25))
    names = {id(p): name for name, p in model.named_parameters()}
    before = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    with attach(model, optimizer):
        model(torch.randn(8, 3, 11, 11, dtype=torch.float64)).sum().backward()
        optimizer.step()
        shrink(model, {"0": torch.tensor([0, 3, 5]), "3": torch.tensor([2])})
    names = {id(p): name for name, p in model.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == before
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    for parameter, state in optimizer.state.items():
        assert all(x.shape in (parameter.shape, ()) for x in state.values() if isinstance(x, Tensor))


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_gradients_follow(kind):
    torch.manual_seed(0)
    model = linear_chain(kind, "norm").train()
    model(torch.randn(8, 9, dtype=torch.float64)).pow(2).sum().backward()

    def gradients() -> list[Tensor]:
        """Of the layer's weight and its reader's, written out, its bias and the norm's scale."""
        found = []
        for layer in (model[0], model[3]):
            if isinstance(layer, SparseLayer):
                full = torch.zeros(layer.topology.places, dtype=torch.float64)
                full[layer.topology.keys()] = layer.values.grad
                found.append(full.view(layer.topology.shape))
            else:
                found.append(layer.weight.grad)
        return [g.clone() for g in (*found, model[0].bias.grad, model[1].weight.grad)]

    weight, reader, bias, scale = gradients()
    kept = torch.tensor([0, 2, 7])
    shrink(model, {"0": kept})
    for now, expected in zip(gradients(), (weight[kept], reader[:, kept], bias[kept], scale[kept]), strict=True):
        assert expected.any()
        assert torch.equal(now, expected)


class Listens(Method):
    def __init__(self) -> None:
        self.heard = []

    def remapped(self, layer, remap):
        self.heard.append((layer, remap))


def test_every_method_is_told_of_every_module_that_changed():
    torch.manual_seed(0)
    model, method = conv_chain("sparse").train(), Listens()
    weights, means = {}, {}
    for module in model:
        if isinstance(module, SparseLayer):
            weights[module] = module.values.detach().clone()
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            means[module] = module.running_mean.clone()
    with attach(model, AdamW(param_groups(model)), method):
        shrink(model, {"3": torch.tensor([0, 2])})
    heard = dict(method.heard)
    assert {*heard} == {model[3], model[4], model[5], model[9], model[10]}
    assert torch.equal(heard[model[3]].apply(weights[model[3]]), model[3].values)
    assert torch.equal(heard[model[10]].apply(weights[model[10]]), model[10].values)
    assert heard[model[3]].rows.old_slot.tolist() == [0, 2]
    assert heard[model[10]].columns.old_slot.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert heard[model[10]].rows is None
    assert torch.equal(heard[model[9]].rows.apply(means[model[9]]), model[9].running_mean)


def test_in_a_session_optimizers_that_are_named_too_move_once():
    torch.manual_seed(0)
    model = linear_chain("sparse").train()
    isolate(model, {"0": torch.arange(8) == 0})  # all weights stay: state would move in place, twice
    optimizer = Adam(param_groups(model), lr=0.01)
    with attach(model, optimizer):
        steps(model, optimizer, 0, 2)
        before = optimizer.state[model[0].values]["exp_avg"].clone()
        shrink(model, {"0": torch.arange(1, 8)}, optimizers=[optimizer])
        assert torch.equal(optimizer.state[model[0].values]["exp_avg"], before)
        steps(model, optimizer, 2, 3)


# -- what somebody's forward decides ------------------------------------------------------------------------------


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two, self.head = nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Linear(8, 6), nn.Linear(6, 4)
        self.scale = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(torch.sigmoid(self.norm(self.one(x)))) * 2.0)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("one", ["norm", nn.Sigmoid(), "two"]),
        ("two", [Doubled(), "head"]),
    ],
)
def test_paths_say_what_a_forward_does(name, path):
    torch.manual_seed(0)
    model, x = lively(Custom()), torch.randn(5, 9, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=f"{name} cannot lose neurons: what follows it is decided in a forward of its own"
    ):
        shrink(model, {name: torch.tensor([1])})
    removed = torch.arange(model.get_submodule(name).out_features) % 2 == 0
    expected = without_incoming(model, name, removed)(x)
    by_module = [model.get_submodule(step) if isinstance(step, str) else step for step in path]
    other = copy.deepcopy(model)
    shrink(model, {name: ~removed}, paths={name: path})
    torch.testing.assert_close(model(x), expected)
    assert other.get_submodule(name).out_features != model.get_submodule(name).out_features
    with pytest.raises(ValueError, match="of the path given is not part of the model, but has a width"):
        shrink(other, {name: ~removed}, paths={name: [*by_module[:-1], copy.deepcopy(by_module[-1])]})


def test_one_name_is_a_path():
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)})
    shrink(model, {"a": torch.tensor([0, 1])}, paths={"a": "b"})
    assert (model["a"].out_features, model["b"].in_features) == (2, 2)


def test_a_sequence_inside_somebody_elses_module_is_followed_to_its_end():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + x[:, :6]

    model = Wrapped()
    assert shrink(model, {"body.0": torch.tensor([0, 1])}) == {"body.0": 6}
    with pytest.raises(ValueError, match=r"body\.2 cannot lose neurons: no layer follows in body"):
        shrink(model, {"body.2": torch.tensor([0, 1])})


# -- refusals -----------------------------------------------------------------------------------------------------


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    return model


def twice() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 2))


class Reversed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


class LinearLike(nn.Linear):
    pass


class Coded(Tensor):
    """A weight in a form of its own, as quantising libraries and sharded training keep it."""


def coded() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight = nn.Parameter(model[2].weight.detach().as_subclass(Coded))
    return model


def normed() -> nn.Module:
    """Its weight is made anew from others at every forward."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2] = nn.utils.spectral_norm(model[2])
    return model


MODELS = {
    "output": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU()), "no layer follows: its neurons are the outputs"),
    "alone": (lambda: nn.Linear(6, 6), "the model cannot lose neurons: no layer follows"),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
        r"1 \(LayerNorm\) follows, which reckons with all neurons together",
    ),
    "softmax": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Softmax(1), nn.Linear(6, 2)), "reckons with all neurons"),
    "stranger": (
        lambda: nn.Sequential(nn.Linear(6, 6), Reversed(), nn.Linear(6, 2)),
        r"1 \(Reversed\) follows, of which it is not known that it keeps neurons apart",
    ),
    "kin": (lambda: nn.Sequential(nn.Linear(6, 6), LinearLike(6, 2)), r"1 \(LinearLike\) follows, of which it is not known"),
    "tied": (tied, "weight of 0 is used in several places"),
    "twice": (twice, "weight of 0 is used in several places"),
    "coded": (coded, "weight of 2 is a Coded, not a plain parameter"),
    "spectral norm": (normed, r"2 \(Linear\) follows, of which it is not known"),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(6, 6, 1, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)),
        "0 is a convolution of 2 groups",
    ),
    "read by groups": (
        lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(), SparseConv2d(6, 2, 1, groups=2, density=0.5)),
        r"2 \(SparseConv2d\) follows, whose 2 groups",
    ),
    "not flattened": (lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.Linear(6, 2)), "does not read images"),
    "flattened before a convolution": (
        lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.Flatten(), nn.Conv2d(6, 2, 1)),
        "does not read rows of features",
    ),
    "a sequence flattened": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Flatten(), nn.Linear(18, 2)), "18 features for 6 neurons"),
    "flattened in part": (
        lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.Flatten(2), nn.Linear(6, 2)),
        "with other dimensions than from 1 to -1",
    ),
    "a norm of another width": (lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(3), nn.Linear(6, 2)), "3 features for 6"),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 2, bias=False)),
        "2 would have to add .* but has no bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), MODELS.values(), ids=MODELS.keys())
def test_what_cannot_be_shrunk_is_refused_with_the_reason(make, message):
    torch.manual_seed(0)
    model = make()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    name = names_of(model)[0]
    before = snapshot(model, optimizer)
    with attach(model, optimizer), pytest.raises(ValueError, match=message):
        shrink(model, {name: torch.tensor([0, 2])})
    assert same(before, snapshot(model, optimizer))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nope": torch.tensor([0])}, "'nope' is no layer with neurons; there are"),
        ({"1": torch.tensor([0])}, "'1' is no layer with neurons"),
        ({"0": torch.tensor([], dtype=torch.int64)}, "keeps no neuron"),
        ({"0": torch.zeros(8, dtype=torch.bool)}, "keeps no neuron"),
        ({"0": torch.tensor([8])}, "from 0 to 7"),
        ({"0": torch.tensor([-1])}, "from 0 to 7"),
        ({"0": torch.tensor([0.0])}, "from 0 to 7"),
        ({"0": torch.tensor([[0]])}, "from 0 to 7"),
        ({"0": torch.ones(6, dtype=torch.bool)}, "a mask of 8"),
        ({"0": torch.tensor([3, 3])}, "names a neuron twice"),
        ({"0": torch.tensor([1]), "4": torch.tensor([1])}, "4 cannot lose neurons: no layer follows"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep, message):
    model = linear_chain()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        shrink(model, keep)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("session", [True, False])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda params: LBFGS(params), "LBFGS keeps a history"),
        (lambda params: Adafactor(params), "Adafactor keeps"),
    ],
)
def test_an_optimizer_that_cannot_follow_refuses_before_anything_moved(make, message, at, session):
    """Whether it has the layer's own weights or those of its reader."""
    torch.manual_seed(0)
    model = linear_chain("dense")
    bad = make(model[at].parameters())
    good = Adam([p for p in model.parameters() if all(p is not q for q in model[at].parameters())])

    def closure() -> Tensor:
        model.zero_grad()
        loss = model(torch.randn(6, 9, generator=seeded(), dtype=torch.float64)).pow(2).sum()
        loss.backward()
        return loss

    good.step(closure)
    bad.step(closure)
    before = snapshot(model, good, bad)
    if session:
        with attach(model, [good, bad]), pytest.raises(ValueError, match=message):
            shrink(model, {"0": torch.tensor([1])})
    else:
        with pytest.raises(ValueError, match=message):
            shrink(model, {"0": torch.tensor([1])}, optimizers=[good, bad])
    assert same(before, snapshot(model, good, bad))


def test_a_reader_that_cannot_take_it_leaves_the_readers_before_it_too():
    """The first layer's constants make those of the second, which nobody takes: all is as it was."""
    torch.manual_seed(0)
    model = lively(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)))
    before = snapshot(model)
    with pytest.raises(ValueError, match="4 would have to add"):
        shrink(model, {"0": torch.tensor([0]), "2": torch.tensor([1])})
    assert same(before, snapshot(model))


def test_inside_data_parallel_nothing_shrinks(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = linear_chain()
        wrapped = DistributedDataParallel(nn.Sequential(model))
        before = snapshot(model)
        with pytest.raises(ValueError, match="change the plain model, then wrap it again"):
            shrink(wrapped, {"module.0.0": torch.tensor([1])})
        for kind in ("sparse", "dense"):
            inner = linear_chain(kind)
            wrapped = DistributedDataParallel(inner)
            optimizer = SGD(wrapped.parameters(), lr=0.1)
            with attach(wrapped, optimizer), pytest.raises(ValueError, match="inside DistributedDataParallel"):
                shrink(inner, {"0": torch.tensor([1])})
        assert same(before, snapshot(model))
    finally:
        torch.distributed.destroy_process_group()


def test_paths_that_cannot_be_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    kept = torch.tensor([0])
    for keep, paths, message in (
        ({"a": kept}, {"a": "d"}, r"not there: \['d'\]"),
        ({"a": kept}, {"d": "a"}, r"not there: \['d'\]"),
        ({"a": kept}, {"a": [nn.ReLU()]}, "its path ends with no layer"),
        ({"a": kept, "b": kept}, {"a": "c", "b": "c"}, "c is said to follow b and another layer too"),
        ({"a": kept, "b": kept}, {"a": "b", "b": "a"}, "in a circle"),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            shrink(model, keep, paths=paths)
        assert same(before, snapshot(model))
