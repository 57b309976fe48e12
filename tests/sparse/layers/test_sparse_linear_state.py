"""What a sparse layer keeps: its places travel with its values, and whoever holds state is told when they move."""

import copy
import gc
import io
import pickle
from contextlib import nullcontext
from multiprocessing.reduction import ForkingPickler

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.func import functional_call

from noctule.core.remap import Remap, exchange, resize
from noctule.core.topology import Topology
from noctule.kernels import Epilogue
from noctule.sparse.layers import SparseConv2d, SparseLinear


def layer(weights: int = 60, seed: int = 0) -> SparseLinear:
    return SparseLinear(30, 20, weights=weights, generator=torch.Generator().manual_seed(seed))


def same(a: SparseLinear, b: SparseLinear) -> bool:
    return a.topology == b.topology and torch.equal(a.values, b.values) and torch.equal(a.bias, b.bias)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def step(module: nn.Module, x: torch.Tensor):
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.pow(2).sum().backward()
    return [y, x.grad, *(p.grad for p in module.parameters())]


X = torch.randn(7, 30, generator=torch.Generator().manual_seed(9))

# -- state_dict ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [60, 7, 600, 0])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_brings_the_places_and_the_next_step_sees_them(weights, assign):
    ours, theirs = layer(seed=0), layer(weights, seed=1)
    step(ours, X)  # everything derived from the old places has been built
    ours.load_state_dict(through_a_file(theirs.state_dict()), assign=assign)
    assert same(ours, theirs)
    assert ours.weights == weights
    for a, b in zip(step(ours, X), step(theirs, X)):
        assert torch.equal(a, b)


def test_loading_the_same_number_of_weights_keeps_the_parameter():
    ours, values = layer(seed=0), None
    values = ours.values
    ours.load_state_dict(layer(seed=1).state_dict())
    assert ours.values is values


def test_loading_as_part_of_a_model():
    ours = nn.Sequential(layer(seed=0), nn.ReLU(), nn.Linear(20, 3))
    theirs = nn.Sequential(layer(9, seed=1), nn.ReLU(), nn.Linear(20, 3))
    assert list(theirs.state_dict()) == ["0.values", "0.bias", "0._extra_state", "2.weight", "2.bias"]
    result = ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert not result.missing_keys
    assert not result.unexpected_keys
    for a, b in zip(step(ours, X), step(theirs, X)):
        assert torch.equal(a, b)


def test_missing_and_unexpected_keys_are_those_of_any_layer():
    state = layer(seed=1).state_dict()
    for key in ("values", "bias", "_extra_state"):
        rest = {k: v for k, v in state.items() if k != key}
        warned = pytest.warns(UserWarning, match="came without") if key == "_extra_state" else nullcontext()
        with warned, pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            layer().load_state_dict(rest)
        with warned:
            assert layer().load_state_dict(rest, strict=False).missing_keys == [key]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight"'):
        layer().load_state_dict({**state, "weight": torch.zeros(20, 30)})
    assert layer().load_state_dict({**state, "more": torch.zeros(1)}, strict=False).unexpected_keys == ["more"]
    ours = layer(seed=0)
    before = copy.deepcopy(ours)
    ours.load_state_dict({}, strict=False)
    assert same(ours, before)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer().load_state_dict(nn.Linear(30, 20).state_dict())


def bad_states():
    state = layer(seed=1).state_dict()
    places = state["_extra_state"]
    yield "values too short", {**state, "values": torch.zeros(59)}, "59.* values do not match 60 places"
    yield "values 2-d", {**state, "values": torch.zeros(60, 1)}, "do not match 60 places"
    yield "another shape", {**SparseLinear(20, 30, weights=60).state_dict(), "bias": state["bias"]}, "does not fit"
    yield "no topology", {**state, "_extra_state": {}}, "not a topology"
    yield "text", {**state, "_extra_state": "places"}, "not a topology"
    yield "nothing", {**state, "_extra_state": places[:0]}, "not the places"
    yield "cut off", {**state, "_extra_state": places[:-1]}, "not the places"
    yield "a digit of another", {**state, "_extra_state": places + (torch.arange(len(places)) == 40)}, "not the places"
    yield "no digits", {**state, "_extra_state": torch.full_like(places, 2048)}, "not the places"
    yield "no numbers", {**state, "_extra_state": places * torch.nan}, "not the places"
    yield "a newer format", {**state, "_extra_state": places + (torch.arange(len(places)) == 0)}, "newer version"
    mean = (places + layer(seed=2).state_dict()["_extra_state"]) / 2
    yield (
        "mean of other places",
        {**state, "_extra_state": mean},
        "averaged with those of a model whose places are others",
    )
    old = layer(seed=1).topology.state_dict()
    yield "dict, cut off", {**state, "_extra_state": {**old, "columns": old["columns"][:-1]}}, "not a topology"
    yield "dict, twice", {**state, "_extra_state": {**old, "columns": torch.zeros(60, dtype=torch.int64)}}, "twice"


@pytest.mark.parametrize(("name", "state", "message"), [pytest.param(*case, id=case[0]) for case in bad_states()])
def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing(name, state, message):
    ours = layer(seed=0)
    before = copy.deepcopy(ours)
    with pytest.raises(RuntimeError, match=message):
        ours.load_state_dict(state)
    assert same(ours, before)
    assert torch.equal(ours(X), before(X))


def test_the_error_names_the_layer():
    model = nn.Sequential(nn.Sequential(layer()))
    state = model.state_dict()
    state["0.0.values"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"0\.0: \(3,\) values do not match 60 places"):
        model.load_state_dict(state)


def test_the_state_is_a_dict_of_tensors_that_safetensors_takes():
    state = nn.Sequential(layer(), nn.ReLU(), layer()).state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    again = safetensors.torch.load(safetensors.torch.save(state))
    ours = nn.Sequential(layer(7, seed=3), nn.ReLU(), layer(8, seed=4))
    ours.load_state_dict(again)
    assert same(ours[0], layer())
    assert same(ours[2], layer())


def test_a_state_from_before_places_were_a_tensor_loads():
    ours, theirs = layer(7, seed=3), layer()
    ours.load_state_dict({**theirs.state_dict(), "_extra_state": theirs.topology.state_dict()})
    assert same(ours, theirs)


def moving_average(x: torch.Tensor) -> torch.Tensor:
    average = x.clone()
    for _ in range(1000):
        average.mul_(0.9999).add_(x, alpha=1 - 0.9999)
    return average


@pytest.mark.parametrize(
    "through",
    [
        lambda x: x.half(),
        lambda x: x.double(),
        lambda x: x.long(),
        lambda x: torch.tensor(x.numpy()),
        lambda x: (x + x) / 2,
        lambda x: sum([0.3 * x, 0.5 * x, 0.2 * x]),
        lambda x: sum([x] * 40) / 40,
        lambda x: torch.tensor((x.numpy() * 6000 + x.numpy() * 601) / 6601),
        moving_average,
        lambda x: x + 0.7 * (x - x),
    ],
    ids="half double long numpy soup mean forty federated average arithmetic".split(),
)
def test_what_tools_do_to_a_state_leaves_the_places(through):
    ours, theirs = layer(7, seed=3), layer()
    ours.load_state_dict({key: through(value) for key, value in theirs.state_dict().items()})
    assert ours.topology == theirs.topology
    assert torch.allclose(ours.values, through(theirs.values.detach()).float())


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.999])
def test_an_average_of_states_over_other_places_is_refused(decay):
    """Also by a tool that averages what is of floating point and copies the rest."""
    model = nn.Sequential(layer(), nn.BatchNorm1d(20))
    average = {key: value.clone() for key, value in model.state_dict().items()}
    for moves in range(2):
        if moves:
            model[0].remap_(*exchange(model[0].topology, torch.arange(9), model[0].topology.missing(9)))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                average[key].lerp_(value, 1 - decay)
            else:
                average[key].copy_(value)
        ours = nn.Sequential(layer(seed=2), nn.BatchNorm1d(20))
        if moves:
            with pytest.raises(RuntimeError, match="averaged with those of a model whose places are others"):
                ours.load_state_dict(average)
        else:
            ours.load_state_dict(average)
            assert same(ours[0], model[0])


# -- values and places come together, or not at all -----------------------------------------------------------------


def test_values_without_their_places_are_taken_for_no_others():
    theirs, ours = layer(seed=1), layer(seed=0)
    before = copy.deepcopy(ours)
    alone = {"values": theirs.values.detach().clone(), "bias": theirs.bias.detach().clone()}
    with pytest.warns(UserWarning, match="nothing"), pytest.raises(RuntimeError, match=r'Missing key.*"_extra_state"'):
        ours.load_state_dict(alone)
    assert torch.equal(ours.values, before.values)
    with pytest.warns(UserWarning, match="values came without _extra_state, their places: nothing was loaded"):
        assert ours.load_state_dict(alone, strict=False).missing_keys == ["_extra_state"]
    assert torch.equal(ours.values, before.values)
    for use in (lambda: ours(X), ours.state_dict, ours.to_dense, lambda: copy.deepcopy(ours)):
        with pytest.raises(RuntimeError, match="60 values of a SparseLinear were loaded without their places"):
            use()
    ours.load_state_dict(theirs.state_dict())
    assert same(ours, theirs)
    assert torch.equal(ours(X), theirs(X))


@pytest.mark.parametrize("order", [("values", "_extra_state", "bias"), ("_extra_state", "bias", "values")])
@pytest.mark.parametrize("weights", [60, 9])
@pytest.mark.filterwarnings("ignore:values came without")
def test_a_state_in_parts_is_the_state_whatever_the_order(order, weights):
    theirs, ours = layer(weights, seed=1), layer(seed=0)
    state = theirs.state_dict()
    for key in order:
        ours.load_state_dict({key: state[key]}, strict=False)
    assert same(ours, theirs)
    assert torch.equal(ours(X), theirs(X))


@pytest.mark.parametrize("loaded", [True, False])
def test_a_state_that_is_loaded_in_place(loaded):
    """As torch.distributed.checkpoint does: into the tensors of a state dict, then load_state_dict, which is easily forgotten."""
    ours, theirs = layer(seed=0), layer(seed=1)
    state = ours.state_dict()
    ours(X)
    for key, value in theirs.state_dict().items():
        state[key].copy_(value)
    if loaded:
        ours.load_state_dict(state)
        assert same(ours, theirs)
    for use in (lambda: ours(X), ours.state_dict, ours.to_dense):
        with nullcontext() if loaded else pytest.raises(RuntimeError, match=r"call model.load_state_dict\(state\)"):
            use()


def test_a_state_dict_is_the_layers_own_tensors_places_too():
    ours = layer()
    state = ours.state_dict()
    copied = copy.deepcopy(state)
    before = copy.deepcopy(ours)
    for _ in range(2):
        moved(ours)
    again = layer(seed=3)
    again.load_state_dict(state)
    assert same(again, ours)
    again.load_state_dict(copied)
    assert same(again, before)
    other = Topology.random((20, 30), 9)
    ours.remap_(other, Remap.between(ours.topology, other))  # its values are another tensor, those in the state stay
    ours.values.data.zero_()
    again.load_state_dict(state)
    assert again.weights == 60
    assert again.values.any()
    del state, before
    ours(X)
    assert not ours.unverified


def test_a_functional_call_with_the_state_of_other_places_is_refused():
    ours, theirs, twin = layer(seed=0), layer(seed=1), copy.deepcopy(layer(seed=0))
    scaled = {key: value * 2 if key == "values" else value for key, value in ours.state_dict().items()}
    torch.testing.assert_close(functional_call(twin, scaled, (X,)), 2 * (ours(X) - ours.bias) + ours.bias)
    with pytest.raises(ValueError, match="belong to other places"):
        functional_call(ours, theirs.state_dict(), (X,))
    assert same(ours, twin)


@pytest.mark.parametrize("weights", [60, 45])
@pytest.mark.parametrize("order", ["values first", "places first"])
def test_a_tool_that_sets_piece_by_piece(order, weights):
    """As transformers does: values as an attribute, places by set_extra_state, in any order."""
    ours, theirs = layer(weights, seed=0), layer(weights, seed=1)
    state = copy.deepcopy(theirs.state_dict())
    for piece in ("values", "places") if order == "values first" else ("places", "values"):
        if piece == "values":
            ours.values = nn.Parameter(state["values"])
        else:
            ours.set_extra_state(state["_extra_state"])
    ours.bias = nn.Parameter(state["bias"])
    assert same(ours, theirs)
    assert torch.equal(ours(X), theirs(X))
    assert same(copy.deepcopy(ours), theirs)


def test_places_without_values_keep_the_numbers_by_place():
    theirs, ours = layer(seed=1), layer(seed=0)
    dense = ours.to_dense().weight.detach()
    ours.load_state_dict({"_extra_state": theirs.state_dict()["_extra_state"]}, strict=False)
    assert ours.topology == theirs.topology
    assert torch.equal(ours.values, dense.flatten()[theirs.topology.keys()])
    ours.remap_(*exchange(ours.topology, torch.arange(9), ours.topology.missing(9)))  # those are the layer's own now
    with pytest.warns(UserWarning, match="nothing was loaded"):
        ours.load_state_dict({"values": theirs.state_dict()["values"]}, strict=False)


# -- copies that are written to ------------------------------------------------------------------------------------


def moved(ours: SparseLinear) -> None:
    ours.remap_(*exchange(ours.topology, torch.arange(9), ours.topology.missing(9)))


WRITERS = {
    "lerp_": lambda e, p: torch.lerp(e.data, p.data, 0.1, out=e.data),
    "in place": lambda e, p: e.mul_(0.9).add_(p, alpha=0.1),
    "data": lambda e, p: e.data.mul_(0.9).add_(p.data, alpha=0.1),
    "assigned": lambda e, p: setattr(e, "data", 0.9 * e.data + 0.1 * p.data),
    "copied": lambda e, p: e.copy_(0.9 * e + 0.1 * p),
    "foreach": lambda e, p: torch._foreach_lerp_([e], [p], 0.1),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
@pytest.mark.parametrize("user", ["copy", "original", "state", "dense"])
def test_a_copy_is_not_averaged_over_other_places(write, user):
    ours = layer()
    average = copy.deepcopy(ours)
    uses = {
        "copy": lambda: average(X),
        "original": lambda: ours(X),
        "state": average.state_dict,
        "dense": average.to_dense,
    }
    with torch.no_grad():
        write(average.values, ours.values)
        uses[user]()
        moved(ours)
        uses[user]()  # a copy that is only kept is what it was
        write(average.values, ours.values)
    with pytest.raises(RuntimeError, match=r"written to after.*ExponentialAverage"):
        uses[user]()


def test_a_copy_that_is_trained_or_loaded_is_on_its_own():
    ours = layer()
    trained, loaded, again = (copy.deepcopy(ours) for _ in range(3))
    moved(ours)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained(X).sum().backward()
    optimizer.step()
    loaded.load_state_dict(ours.state_dict())
    assert same(loaded, ours)
    again = copy.deepcopy(again)
    with torch.no_grad():
        again.values.mul_(0.5)
        loaded.values.mul_(0.5)
    for use in (ours, trained, loaded, again):
        use(X)
        use.state_dict()
    moved(ours)
    with torch.no_grad():
        loaded.values.mul_(0.5)
    with pytest.raises(RuntimeError, match="written to after"):  # a target network that was loaded, then averaged
        ours(X)


def test_a_copy_that_is_gone_asks_for_nothing():
    ours = layer()
    snapshot = copy.deepcopy(ours)
    moved(ours)
    ours(X)
    assert ours.unverified
    del snapshot
    gc.collect()
    ours(X)
    assert not ours.unverified


def test_loading_casts_to_the_dtype_of_the_layer():
    ours = layer().double()
    ours.load_state_dict(layer(9, seed=1).state_dict())
    assert ours.values.dtype == torch.float64
    assert torch.equal(ours.values, layer(9, seed=1).values.double())


# -- copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_stand_on_their_own(how):
    ours = layer()
    ours.epilogue = Epilogue(0.0, 0.5)
    ours.values.requires_grad_(False)
    called = []
    ours.register_remap_hook(lambda *_: called.append("hook"))
    ours.register_remap_check(lambda *_: called.append("check"))
    ours.watch = lambda *_: called.append("watch")
    model = nn.Sequential(ours, ours)
    twin = how(model)
    assert twin[0] is twin[1]
    theirs = twin[0]
    assert same(ours, theirs)
    assert theirs.epilogue == ours.epilogue
    assert not theirs.values.requires_grad
    theirs.values.requires_grad_()
    theirs.eval()(X).sum().backward()
    with torch.no_grad():
        theirs.values.zero_()
    theirs.remap_(Topology.random((20, 30), 5), Remap(torch.full((5,), -1), 60))
    assert not called
    assert ours.weights == 60
    assert ours.values.abs().sum() > 0
    assert ours.values.grad is None
    assert ours._remap_hooks
    assert ours.watch is not None


def test_between_processes_parameters_share_their_memory():
    ours = layer()
    theirs = pickle.loads(ForkingPickler.dumps(nn.Sequential(ours)))[0]
    assert same(ours, theirs)
    with torch.no_grad():
        theirs.values.fill_(2.0)
    assert (ours.values == 2.0).all()


def test_a_copy_of_an_average_model():
    averaged = torch.optim.swa_utils.AveragedModel(nn.Sequential(layer()))
    model = nn.Sequential(layer())
    averaged.update_parameters(model)
    assert torch.equal(averaged(X), model(X))


def test_moving_keeps_places_and_values_together():
    ours = layer()
    before = copy.deepcopy(ours)
    assert ours.double() is ours
    assert ours.values.dtype == ours.bias.dtype == torch.float64
    ours.to("cpu").float()
    assert same(ours, before)
    ours.share_memory()
    assert same(ours, before)
    ours.requires_grad_(False)
    assert not ours(X).requires_grad


@pytest.mark.parametrize("weights", [60, 7])
def test_a_layer_made_without_memory_takes_it_from_a_state(weights):
    theirs = nn.Sequential(layer(weights, seed=1), nn.Linear(20, 3))
    with torch.device("meta"):
        empty = [nn.Sequential(SparseLinear(30, 20, weights=60), nn.Linear(20, 3)) for _ in range(2)]
    assert empty[0][0].values.is_meta
    assert empty[0][0].topology.device.type == "cpu"
    empty[0].to_empty(device="cpu").load_state_dict(theirs.state_dict())
    empty[1].load_state_dict(theirs.state_dict(), assign=True)
    for ours in empty:
        for a, b in zip(step(ours, X), step(theirs, X)):
            assert torch.equal(a, b)


def test_a_default_device_is_that_of_the_parameters_only():
    ours = layer()
    with torch.device("meta"):
        assert SparseLinear(30, 20, weights=60).bias.is_meta
        assert not SparseLinear(30, 20, topology=ours.topology).bias.is_meta
        new, remap = exchange(ours.topology, torch.arange(9, device="cpu"), ours.topology.missing(9))
        ours.remap_(new, remap)
        ours.epilogue = Epilogue(0.0, 0.5)
        ours(X).sum().backward()
    assert ours.values.grad.shape == (60,)


# -- changing places ----------------------------------------------------------------------------------------------


def test_remap_with_as_many_weights_keeps_the_parameter_and_tells_after_the_fact():
    ours, told = layer(), []
    old, before = ours.values, ours.values.detach().clone()
    new, remap = exchange(ours.topology, torch.arange(9), ours.topology.missing(9))
    ours.register_remap_hook(lambda *arguments: told.append((*arguments, ours.topology, ours.values.detach().clone())))
    step(ours, X)
    ours.remap_(new, remap)
    assert ours.values is old
    assert torch.equal(ours.values, remap.apply(before))
    ((who, parameters, same_remap, topology, values),) = told
    assert (who, same_remap, topology) == (ours, remap, new)
    assert {name: id(p) for name, p in parameters.items()} == {"values": id(old), "bias": id(ours.bias)}
    assert torch.equal(values, ours.values)
    twin = SparseLinear.from_dense(ours.to_dense(), topology=new)
    for a, b in zip(step(ours, X), step(twin, X)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weights", [0, 13, 600])
def test_remap_to_another_number_makes_a_new_parameter(weights):
    ours, told = layer(), []
    old, trainable = ours.values, False
    old.requires_grad_(trainable)
    new = Topology.random((20, 30), weights)
    ours.register_remap_hook(lambda _, parameters, remap: told.append(parameters["values"]))
    ours.remap_(new, Remap.between(ours.topology, new), new=torch.full((weights,), 2.0))
    assert told == [old]
    assert ours.values is not old
    assert not ours.values.requires_grad
    assert dict(ours.named_parameters())["values"] is ours.values
    assert ours.weights == weights
    assert ours(X).shape == (7, 20)


def test_a_check_that_refuses_leaves_the_layer_as_it_was():
    ours, told = layer(), []
    before = copy.deepcopy(ours)

    def refuse(_, remap):
        raise ValueError(f"not {remap.new_size}")

    ours.register_remap_check(lambda *_: told.append("first"))
    handle = ours.register_remap_check(refuse)
    ours.register_remap_hook(lambda *_: told.append("moved"))
    new = Topology.random((20, 30), 9)
    with pytest.raises(ValueError, match="not 9"):
        ours.remap_(new, Remap.between(ours.topology, new))
    with pytest.raises(RuntimeError, match="not 9"):  # loading is a change too
        ours.load_state_dict(layer(9, seed=1).state_dict())
    assert told == ["first", "first"]
    assert same(ours, before)
    handle.remove()
    ours.remap_(new, Remap.between(ours.topology, new))
    assert told[2:] == ["first", "moved"]


def test_a_remap_of_another_layer_is_refused():
    ours = layer()
    with pytest.raises(ValueError, match="does not lead from 60"):
        ours.remap_(ours.topology, Remap(torch.arange(59), 59))


@pytest.mark.parametrize("rows", [None, [3, 0, 7], [5, -1, 6]])
@pytest.mark.parametrize("columns", [None, [1, 4, 2, 29], [-1, 8]])
def test_another_width_is_rows_and_columns_of_the_dense_twin(rows, columns):
    ours = layer(200)
    step(ours, X)
    lines = {
        "rows": None if rows is None else torch.tensor(rows),
        "columns": None if columns is None else torch.tensor(columns),
    }
    bordered, bias = torch.zeros(21, 31), torch.cat([ours.bias.detach(), torch.zeros(1)])
    bordered[:20, :30] = ours.to_dense().weight.detach()
    r, c = (torch.arange(size) if x is None else x for x, size in zip(lines.values(), (20, 30)))
    gradient = torch.cat([ours.bias.grad, torch.zeros(1)])
    parameter = ours.bias
    ours.remap_(*resize(ours.topology, **lines))
    assert (ours.out_features, ours.in_features) == ours.topology.shape == (r.numel(), c.numel())
    assert torch.equal(ours.to_dense().weight, bordered[r][:, c])
    assert torch.equal(ours.bias, bias[r])
    assert torch.equal(ours.bias.grad, gradient[r])
    assert (ours.bias is parameter) == (rows is None)
    assert ours(torch.randn(5, c.numel())).shape == (5, r.numel())


def test_a_change_of_width_that_is_not_said_is_refused():
    ours = layer()
    before = copy.deepcopy(ours)
    other = Topology.from_keys((30, 20), ours.topology.keys())
    with pytest.raises(ValueError, match=r"does not say how a layer of shape \(20, 30\) becomes one of \(30, 20\)"):
        ours.remap_(other, Remap(torch.arange(60), 60))
    assert same(ours, before)


def test_a_convolution_changes_by_whole_channels_and_only_without_groups():
    ours = SparseConv2d(4, 6, (3, 2), density=0.5)
    twin = ours.to_dense().weight.detach()
    columns = (torch.tensor([1, 3])[:, None] * 6 + torch.arange(6)).flatten()
    ours.remap_(*resize(ours.topology, rows=torch.tensor([5, 0, 2]), columns=columns))
    assert (ours.in_channels, ours.out_channels) == (2, 3)
    assert torch.equal(ours.to_dense().weight, twin[[5, 0, 2]][:, [1, 3]])
    for refused, lines in (
        (ours, {"columns": torch.arange(5)}),
        (SparseConv2d(4, 6, 3, groups=2, density=0.5), {"rows": torch.arange(4)}),
    ):
        values, topology = refused.values, refused.topology
        with pytest.raises(ValueError, match="only one without groups can, by whole channels"):
            refused.remap_(*resize(refused.topology, **lines))
        assert refused.values is values
        assert refused.topology is topology


def test_hooks_may_remove_themselves():
    ours, told = layer(), []
    handles = [ours.register_remap_hook(lambda *_, k=k: (told.append(k), handles[k].remove())) for k in range(3)]
    for _ in range(2):
        new, remap = exchange(ours.topology, torch.arange(9), ours.topology.missing(9))
        ours.remap_(new, remap)
    assert told == [0, 1, 2]


def test_backward_after_a_change_of_size_uses_the_places_of_its_forward():
    ours = layer()
    expected = step(ours, X)
    old, x = ours.values, X.clone().requires_grad_()
    ours.zero_grad()
    y = ours(x)
    new = Topology.random((20, 30), 9)
    ours.remap_(new, Remap.between(ours.topology, new))
    y.pow(2).sum().backward()
    assert torch.equal(x.grad, expected[1])
    assert torch.equal(old.grad, expected[2])
    assert ours.values.grad is None
