"""The least important neurons go on schedule, with everything that is kept for them, and stopping changes nothing."""

import copy
import io
import signal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW

from noctule.checkpoint import load, save
from noctule.compress.shrink import ImportancePruning, importance, resize_to
from noctule.core.convert import convert_
from noctule.core.errors import CheckpointError
from noctule.core.method import Method, attach
from noctule.core.optim import param_groups
from noctule.core.remap import Remap
from noctule.core.topology import Topology
from noctule.data import Batches, Dataset
from noctule.report import Journal, RunFolder
from noctule.sparse.layers import FuseEpilogue, SparseLayer, SparseLinear, ToSparse
from noctule.sparse.rewire import gse, rigl, set_
from noctule.train.fit import evaluate, fit

OPTIMIZERS = {
    "momentum": lambda groups: SGD(groups, lr=0.05, momentum=0.9),
    "adam": lambda groups: Adam(groups, lr=0.01),
    "adamw fused": lambda groups: AdamW(groups, lr=0.01, fused=True),
    "adamw foreach": lambda groups: AdamW(groups, lr=0.01, foreach=True),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def network(*, kind: str = "sparse", fused: bool = False, seed: int = 1) -> nn.Sequential:
    """10 -> 20 -> 30 -> 3."""
    torch.manual_seed(seed)
    between = lambda n: [nn.ReLU(), nn.Dropout(0.2)] if fused else [nn.BatchNorm1d(n), nn.ReLU()]  # noqa: E731
    layers = [nn.Linear(10, 20), *between(20), nn.Linear(20, 30), *between(30), nn.Linear(30, 3)]
    model = nn.Sequential(*layers)
    if kind == "sparse":
        convert_(model, ToSparse(density=0.4))
    elif kind == "mixed":
        convert_(model, ToSparse(density=0.4), where=lambda name, module: name == "3")
    if fused:
        convert_(model, FuseEpilogue())
    return model


def hidden(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear | SparseLinear)][:-1]


def widths(model: nn.Module) -> list[int]:
    return [layer.out_features for layer in hidden(model)]


def run(model: nn.Module, optimizer, first: int, last: int) -> None:
    model.train()
    for number in range(first, last):
        optimizer.zero_grad()
        x = torch.randn(16, 10, generator=torch.Generator().manual_seed(number))
        (model(x) - x[:, :3]).pow(2).mean().backward()
        optimizer.step()


# -- which neurons go, and when -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_importance_is_the_sum_of_absolute_incoming_weights(kind):
    model = network(kind=kind)
    for layer in hidden(model):
        weight = layer.to_dense().weight if isinstance(layer, SparseLayer) else layer.weight
        torch.testing.assert_close(importance(layer).float(), weight.detach().abs().sum(1))
    conv = nn.Conv2d(3, 4, 2)
    torch.testing.assert_close(importance(conv), conv.weight.detach().abs().sum((1, 2, 3)))


class Before(Method):
    """Keeps the hidden layers as they are just before neurons go (methods act in reverse after a step)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def after_step(self) -> None:
        self.layers = [copy.deepcopy(layer) for layer in hidden(self.model)]


@pytest.mark.parametrize("kind", ["sparse", "dense", "mixed"])
def test_the_least_important_go_and_the_others_keep_their_rows(kind):
    model = network(kind=kind)
    optimizer, before = Adam(param_groups(model)), Before(model)
    method = ImportancePruning(every=1, percentile=25.0, start=2)
    with attach(model, optimizer, method, before):
        for step in range(4):
            run(model, optimizer, step, step + 1)
            for old, new in zip(before.layers, hidden(model), strict=True):
                neurons = old.out_features
                gone = neurons // 4 if step else 0
                assert new.out_features == neurons - gone
                order = importance(old).sort()
                stay = order.indices[gone:].sort().values
                assert torch.equal(
                    new.bias[: stay.numel()].detach().isfinite(), torch.ones(stay.numel(), dtype=torch.bool)
                )
                if new is hidden(model)[0]:  # the columns of the others change too
                    full = (x.to_dense().weight if isinstance(x, SparseLayer) else x.weight for x in (new, old))
                    now, then = full
                    assert torch.equal(now, then[stay])
    assert widths(model) == [9, 14]  # 20 15 12 9 and 30 23 18 14
    assert method.removed == {"0": 11, "3": 16}
    assert model[-1].out_features == 3


def test_a_neuron_without_incoming_weights_goes_first():
    model = network()
    layer = model[0]
    places = layer.topology.keys()
    empty = torch.tensor([3, 17])
    stays = ~torch.isin(layer.topology.rows(), empty)
    new = Topology.from_keys(layer.topology.shape, places[stays])
    layer.remap_(new, Remap.between(layer.topology, new))
    optimizer, before = SGD(model.parameters(), lr=0.0), layer.bias.detach().clone()
    with attach(model, optimizer, ImportancePruning(every=1, percentile=10.0)):
        run(model, optimizer, 0, 1)
    kept = [k for k in range(20) if k not in (3, 17)]
    assert torch.equal(layer.bias.detach(), before[kept])


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"every": 3}, [16, 16, 16, 13, 13, 13, 11, 11, 11]),
        ({"every": 3, "start": 4}, [20, 20, 20, 16, 16, 16, 13, 13, 13]),
        ({"every": 2, "until": 5}, [16, 16, 13, 13, 13, 13, 13, 13, 13]),
        ({"every": 1, "least": 12}, [16, 13, 12, 12, 12, 12, 12, 12, 12]),
        ({"every": 1, "percentile": 4.0}, [20] * 9),
        ({"every": 1, "percentile": 99.0}, [1] * 9),
    ],
)
def test_the_schedule(options, found):
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    seen = []
    with attach(model, optimizer, ImportancePruning(**options)):
        for step in range(9):
            run(model, optimizer, step, step + 1)
            seen.append(widths(model)[0])
    assert seen == found


def test_layers_may_be_left_alone():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    method = ImportancePruning(every=1, skip=["0"])
    with attach(model, optimizer, method):
        run(model, optimizer, 0, 1)
    assert widths(model) == [20, 24]
    assert method.removed == {"3": 6}


def test_what_cannot_be_pruned_is_left_and_why_is_said():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    model = nn.Sequential(
        *(nn.Linear(10, 8), Residual(), nn.Linear(8, 9, bias=False), nn.Sigmoid()),
        *(nn.Linear(9, 7, bias=False), nn.ReLU(), nn.Linear(7, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU()),
        *(nn.Linear(6, 3, bias=False),),
    )
    method = ImportancePruning(every=1)
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(model, optimizer, method):
        assert set(method.removed) == {"1.inner.0", "4"}
        reasons = {name: why.split(":")[0] for name, why in method.left.items()}
        run(model, optimizer, 0, 2)
    assert reasons.pop("2").startswith("4, which reads it, has no bias")
    assert reasons.pop("0").startswith("1 (Residual) follows, of which it is not known")
    assert reasons.pop("1.inner.2").startswith("no layer follows in 1.inner")
    assert reasons.pop("6").startswith("9, which reads it, has no bias")  # the norm will have learnt to shift
    assert reasons == {"9": "no layer follows"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 2)), "there is no hidden layer to prune: 0: no layer follows"),
        (nn.Sequential(nn.Conv1d(4, 2, 1)), "the model has no layer with neurons"),
    ],
)
def test_a_model_without_hidden_layers_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        attach(model, SGD(model.parameters(), lr=0.1), ImportancePruning(every=1))


def test_an_optimizer_that_cannot_follow_is_refused_at_the_start():
    model = network()
    with pytest.raises(ValueError, match=r"no hidden layer to prune: .*LBFGS keeps a history"):
        attach(model, LBFGS(model.parameters()), ImportancePruning(every=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "at least 1"),
        ({"every": 1, "start": 0}, "at least 1"),
        ({"every": 1, "least": 0}, "at least 1"),
        ({"every": 1, "percentile": 0.0}, "above 0 and below 100"),
        ({"every": 1, "percentile": 100.0}, "above 0 and below 100"),
        ({"every": 1, "percentile": float("nan")}, "above 0 and below 100"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImportancePruning(**options)
    model = network()
    with pytest.raises(ValueError, match=r"skip names no layer with neurons: \['nope'\]"):
        attach(model, SGD(model.parameters(), lr=0.1), ImportancePruning(every=1, skip=["nope"]))


def test_paths_reach_a_custom_forward():
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = SparseLinear(10, 20, density=0.5), SparseLinear(20, 3, density=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).relu())

    model = Custom()
    optimizer = Adam(param_groups(model))
    with attach(model, optimizer, ImportancePruning(every=2, paths={"one": [nn.ReLU(), "two"]})):
        run(model, optimizer, 0, 3)
    assert (model.one.out_features, model.two.in_features, model.two.out_features) == (13, 13, 3)


# -- together with others -----------------------------------------------------------------------------------------

KINDS = {"set": set_, "gse": gse, "rigl": lambda **options: rigl(until=1000, **options)}


@optimizers
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_connections_and_neurons_move_in_one_session(make, kind, pruning_first, fused):
    model = network(fused=fused)
    epilogues = [m.epilogue for m in model if isinstance(m, SparseLayer)]
    optimizer = make(param_groups(model))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=12)
    pruning, rewiring = ImportancePruning(every=4, start=2, percentile=15.0), kind(every=2, fraction=0.3)
    methods = [pruning, rewiring] if pruning_first else [rewiring, pruning]
    with attach(model, optimizer, *methods) as session:
        for step in range(12):
            weights = [m.weights for m in model if isinstance(m, SparseLayer)]
            moved = sum(rewiring.moved.values())
            run(model, optimizer, step, step + 1)
            scheduler.step()
            now = [m.weights for m in model if isinstance(m, SparseLayer)]
            removing = step + 1 in (2, 6, 10)
            assert all(a < b for a, b in zip(now, weights)) if removing else now == weights
            if (step + 1) % 2 == 0 and (not removing or pruning_first or kind is set_):
                assert sum(rewiring.moved.values()) > moved
        assert session.steps == 12
    assert widths(model) == [20 - 3 - 2 - 2, 30 - 4 - 3 - 3]
    assert [m.epilogue for m in model if isinstance(m, SparseLayer)] == epilogues
    for module in model:
        if isinstance(module, SparseLayer):
            assert module.topology.shape == (module.out_features, module.in_features)
            assert module.values.shape == (module.topology.size,)
            assert module.watch is None
            assert not module._remap_hooks
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    for parameter, state in optimizer.state.items():
        assert all(x.shape in (parameter.shape, ()) for x in state.values() if isinstance(x, Tensor))
    assert all(p.isfinite().all() for p in model.parameters())


def test_removing_none_is_not_pruning():
    plain, pruned = network(), network()
    for model, methods in ((plain, []), (pruned, [ImportancePruning(every=1, start=100)])):
        optimizer = Adam(param_groups(model), lr=0.01)
        with attach(model, optimizer, *methods):
            run(model, optimizer, 0, 5)
    assert all(map(torch.equal, plain.parameters(), pruned.parameters()))


# -- stopping and going on ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy() -> Dataset:
    inputs = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    return Dataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long(), name="toy", classes=3)


class Extra(Method):
    """Ctrl-C at a step, as a person would; without a step, nothing, so that sessions have the same shape."""

    def __init__(self, step: int | None) -> None:
        self.step, self.seen = step, 0

    def after_step(self) -> None:
        self.seen += 1
        if self.seen == self.step:
            signal.raise_signal(signal.SIGINT)


def journal(path) -> Journal:
    path = path / "run"
    folder = RunFolder(path) if path.exists() else RunFolder.create(path, recipe="test", options={}, seed=0)
    return Journal(folder, "sparse")


def train(toy, make, how, kept=None, *, stop=None, epochs=4, **options):
    """7 steps an epoch; neurons go after steps 5, 9, 13 and 17."""
    model = network(**{**how, **options})
    optimizer = make(param_groups(model))
    fitted = fit(
        model,
        optimizer,
        Batches(toy, 32, seed=3),
        validation=toy,
        epochs=epochs,
        methods=[
            ImportancePruning(every=4, start=5, until=18, percentile=10.0),
            *([] if how["kind"] == "dense" else [gse(every=3)]),
            Extra(stop),
        ],
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60),
        journal=kept,
    )
    return model, optimizer, fitted


def assert_same(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for key, x in a.items():
        for p, q in zip(x.values(), b[key].values(), strict=True) if isinstance(x, dict) else [(x, b[key])]:
            assert torch.equal(p, q) if isinstance(p, Tensor) else p == q, key


HOW = {
    "sparse, fused": {"kind": "sparse", "fused": True},
    "mixed, with norms": {"kind": "mixed", "fused": False},
    "dense, with norms": {"kind": "dense", "fused": False},
}


@pytest.mark.parametrize(
    ("name", "how", "stop"),
    [
        *((name, how, 9) for name in OPTIMIZERS for how in HOW),
        *(("adamw fused", "sparse, fused", k) for k in (4, 5, 23)),
    ],
)
def test_resumed_is_never_stopped(toy, tmp_path, name, how, stop):
    make, how = OPTIMIZERS[name], HOW[how]
    whole, optimizer, fitted = train(toy, make, how)
    assert widths(whole) == [15, 21]
    kept = journal(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(toy, make, how, kept, stop=stop)
    resumed, other, again = train(toy, make, how, kept)
    assert_same(whole, resumed)
    assert (again.best_accuracy, again.best_epoch, again.step) == (fitted.best_accuracy, fitted.best_epoch, fitted.step)
    for a, b in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


def test_the_best_epoch_is_one_of_the_network_that_is_left(toy):
    model, _, fitted = train(toy, OPTIMIZERS["adam"], {"kind": "sparse", "fused": True}, epochs=3)
    assert fitted.best_epoch == 3  # neurons went in all three
    model.load_state_dict(fitted.best_state)
    assert evaluate(model, toy)[1] == fitted.best_accuracy


def test_a_better_epoch_of_a_wider_network_is_forgotten(toy):
    model = network(fused=True)
    fit(model, Adam(model.parameters(), lr=0.01), Batches(toy, 32, seed=3), validation=toy, epochs=10)
    before = evaluate(model, toy)[1]
    method = ImportancePruning(every=100, percentile=90.0, start=5)  # in the third of four epochs
    optimizer = SGD(model.parameters(), lr=0.0)
    records = []

    class Told(Method):
        def observe(self, **scores):
            records.append((scores["validation_accuracy"], widths(model)))

    fitted = fit(model, optimizer, Batches(toy, 100, seed=3), validation=toy, epochs=4, methods=[method, Told()])
    assert records[0][0] == before > records[-1][0], "the wider network is the better one"
    assert records[0][1] > records[-1][1]
    model.load_state_dict(fitted.best_state)
    assert fitted.best_accuracy == evaluate(model, toy)[1] == records[-1][0]


def test_a_checkpoint_of_a_network_that_began_otherwise_is_refused(toy, tmp_path):
    kept = journal(tmp_path)
    make, how = OPTIMIZERS["adam"], {"kind": "sparse", "fused": True}
    train(toy, make, how, kept, epochs=2)
    wider = nn.Sequential(SparseLinear(10, 25, density=0.4), nn.ReLU(), SparseLinear(25, 3, density=0.4))
    optimizer = make(param_groups(wider))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    with pytest.raises(CheckpointError, match="its model had other layers, or layers of other widths, when it began"):
        fit(wider, optimizer, Batches(toy, 32, seed=3), validation=toy, epochs=3, scheduler=scheduler, journal=kept)


def saved(model, optimizer, session, path) -> dict:
    save(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "session": session.state_dict()})
    return load(path)


def test_a_loop_of_ones_own_goes_on_too(tmp_path):
    def methods():
        return ImportancePruning(every=3, percentile=10.0), gse(every=2)

    def new():
        model = network()
        return model, AdamW(param_groups(model), lr=0.01)

    whole, optimizer = new()
    with attach(whole, optimizer, *methods()) as session:
        run(whole, optimizer, 0, 5)
        saved(whole, optimizer, session, tmp_path / "state.safetensors")
        run(whole, optimizer, 5, 10)
    for inside in (True, False):
        model, optimizer = new()
        state = load(tmp_path / "state.safetensors")
        if not inside:
            resize_to(model, state["model"], optimizers=[optimizer])
        with attach(model, optimizer, *methods()) as session:
            if inside:
                resize_to(model, state["model"])
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            session.load_state_dict(state["session"])
            run(model, optimizer, 5, 10)
            assert session.steps == 10
        assert_same(whole, model)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_the_wrong_order_is_told(tmp_path, kind):
    model = network(kind=kind)
    optimizer = AdamW(param_groups(model), lr=0.01)
    with attach(model, optimizer, ImportancePruning(every=1)) as session:
        run(model, optimizer, 0, 2)
        state = saved(model, optimizer, session, tmp_path / "state.safetensors")
    model = network(kind=kind)
    optimizer = AdamW(param_groups(model), lr=0.01)
    with attach(model, optimizer, ImportancePruning(every=1)):
        message = r"resize_to\(model, state\) before" if kind == "sparse" else "size mismatch"
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state["model"])
    model = network(kind=kind)
    optimizer = AdamW(param_groups(model), lr=0.01)
    with attach(model, optimizer, ImportancePruning(every=1)):
        optimizer.load_state_dict(state["optimizer"])
        with pytest.raises(ValueError, match="load the model of a checkpoint before its optimizer"):
            resize_to(model, state["model"])
    assert widths(model) == [20, 30]


# -- resize_to ----------------------------------------------------------------------------------------------------


def conv_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6), nn.Conv2d(6, 5, (2, 3)), nn.Flatten()),
        *(nn.BatchNorm1d(5 * 3 * 2, affine=False), nn.Linear(30, 4)),
    )


@pytest.mark.parametrize("sparse", [True, False])
def test_a_state_of_any_widths_fits_afterwards(sparse):
    def new() -> nn.Sequential:
        model = conv_network()
        return convert_(model, ToSparse(density=0.5)).model if sparse else model

    model, x = new(), torch.randn(4, 2, 6, 6)
    wide = copy.deepcopy(model.state_dict())
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with attach(model, optimizer, ImportancePruning(every=1, percentile=40.0)):
        model(x).sum().backward()
        optimizer.step()
    assert (model[0].out_channels, model[3].out_channels, model[6].in_features) == (4, 3, 18)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    narrow = torch.load(file, weights_only=True)
    other = new()
    for state in (narrow, wide, narrow):
        resize_to(other, state)
        other.load_state_dict(state)
    assert_same(model, other)
    torch.testing.assert_close(other.eval()(x), model.eval()(x))
    values = other[0].values if sparse else other[0].weight
    resize_to(other, narrow)  # nothing to do
    assert (other[0].values if sparse else other[0].weight) is values


def test_a_state_of_another_model_is_left_to_loading():
    model = conv_network()
    before = str(model)
    for state in ({}, {"0.weight": torch.zeros(3)}, {"0.weight": "text"}, {"0.weight": torch.zeros(6, 2, 5, 5)}):
        resize_to(model, state)
        assert str(model) == before
    sparse = nn.Sequential(SparseLinear(4, 3, density=0.5))
    for extra in ({}, "text", {"shape": 3}, {"shape": ["a", "b"]}):
        resize_to(sparse, {"0._extra_state": extra})
        assert sparse[0].out_features == 3


def test_in_a_session_the_optimizer_has_what_the_model_has():
    model = network()
    optimizer = Adam(param_groups(model))
    with attach(model, optimizer) as session:
        smaller = network()
        with attach(smaller, SGD(smaller.parameters(), lr=0.1), ImportancePruning(every=1)) as other:
            run(smaller, other.optimizers[0], 0, 1)
        resize_to(model, smaller.state_dict())
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}
        assert session.steps == 0
