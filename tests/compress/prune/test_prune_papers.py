"""The methods of the papers do what their pages say, and stopping changes nothing."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from noctule.checkpoint import load, save
from noctule.compress.prune import SCL, EarlyCroP, GaP, Globally, SupTickets, sup_tickets
from noctule.compress.prune.early_crop import gradient_flow
from noctule.compress.shrink.following import Following
from noctule.core.convert import convert_
from noctule.core.method import Method, attach
from noctule.core.optim import param_groups
from noctule.models import resnet
from noctule.sparse.layers import SparseLayer, ToSparse


def network(*, sparse: bool = False, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)),
    )
    if sparse:
        convert_(model, ToSparse(density=0.3, generator=torch.Generator().manual_seed(seed)))
    return model


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(number))
    return x, x[:, :3].argmax(1)


def run(model: nn.Module, optimizer, first: int, last: int) -> None:
    model.train()
    for number in range(first, last):
        optimizer.zero_grad()
        x, y = batch(number)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def early(**options) -> EarlyCroP:
    return EarlyCroP(density=0.2, loss_fn=F.cross_entropy, batches=[batch(-1), batch(-2)], every=2, **options)


METHODS = {
    "gap": lambda: [GaP(density=0.2, every=2, partitions=3, rounds=1)],
    "early": lambda: [early(latest=6)],
    "scl": lambda: [SCL(penalty=0.3, until=9, rate=0.3)],
    "sup": lambda: [*sup_tickets(start=4, cycle=2, tickets=3, every=2)],
}
methods = pytest.mark.parametrize("name", METHODS)


class Watch(Method):
    """Checks after every step; attached first, it comes last."""

    def __init__(self, check) -> None:
        self.check = check

    def after_step(self) -> None:
        self.check()


def densities(model: nn.Module) -> list[float]:
    return [float((m.weight != 0).float().mean()) for m in model.modules() if isinstance(m, nn.Linear)]


@methods
@pytest.mark.parametrize("stop", [3, 5, 8, 10])
def test_resumed_is_never_stopped_bit_for_bit(name, stop, tmp_path):
    def pieces():
        model = network(sparse=name == "sup")
        return model, AdamW(param_groups(model), lr=0.01), METHODS[name]()

    model, optimizer, own = pieces()
    with attach(model, optimizer, *own) as session:
        run(model, optimizer, 0, stop)
        save(tmp_path / "c", {"m": model.state_dict(), "o": optimizer.state_dict(), "s": session.state_dict()})
        run(model, optimizer, stop, 12)
    resumed, optimizer, others = pieces()
    state = load(tmp_path / "c")
    with attach(resumed, optimizer, *others) as session:
        resumed.load_state_dict(state["m"])
        optimizer.load_state_dict(state["o"])
        session.load_state_dict(state["s"])
        run(resumed, optimizer, stop, 12)
    if name == "sup":
        for method, each in ((own, model), (others, resumed)):
            method[-1].superpose_(each)
    for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["gap", "early", "scl"])
def test_nothing_is_left_of_them_in_a_closed_session(name):
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, *METHODS[name]()):
        run(model, optimizer, 0, 12)
    before = densities(model)
    assert before != [1.0] * 3
    run(model, optimizer, 12, 13)
    assert not model._forward_hooks
    assert all(now > then for now, then in zip(densities(model), before, strict=True))  # no mask holds any more


# -- GaP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_gap_grows_one_partition_after_the_other(sparse):
    model = network()
    if sparse:
        convert_(model, ToSparse(density=1.0, fresh=False))
    optimizer = SGD(param_groups(model), lr=0.1, momentum=0.9)
    gap, seen = GaP(density=0.2, every=2, partitions=3, rounds=2), []
    with attach(model, optimizer, Watch(lambda: seen.append([k.density for k in gap.report().values()])), gap):
        run(model, optimizer, 0, 16)
    turns = [[round(d, 1) for d in row] for row in seen]
    cycle = [[1.0 if layer == part else 0.2 for layer in range(3)] for part in range(3) for _ in range(2)]
    assert turns == cycle + cycle + [[0.2] * 3] * 4


def test_what_grows_starts_at_zero_and_learns():
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.01)
    gap, seen = GaP(density=0.2, every=2, partitions=3, rounds=1), []
    with attach(model, optimizer, Watch(lambda: seen.append(densities(model))), gap):
        run(model, optimizer, 0, 6)
    assert seen[2][1] == pytest.approx(0.2, abs=0.01)  # the second layer may grow, and is zero there still
    assert seen[3][1] > 0.5
    moved = optimizer.state[model[3].weight]["exp_avg_sq"]
    assert moved.isfinite().all()


def test_gap_refuses_more_partitions_than_layers():
    model = network()
    with pytest.raises(ValueError, match="3 layers cannot be cut into 4"):
        attach(model, SGD(model.parameters(), lr=0.1), GaP(density=0.5, every=1, partitions=4))


# -- EarlyCroP ------------------------------------------------------------------------------------------------------


def test_the_score_is_the_weight_times_the_hessian_times_the_gradient():
    model = network().double()
    batches = [(x.double(), y) for x, y in (batch(1), batch(2))]
    method = early()
    with attach(model, SGD(model.parameters(), lr=0.1), method):
        scores = gradient_flow(model, method, F.cross_entropy, batches)
    model.eval()
    names = ["0.weight", "3.weight", "5.weight"]
    weights = [model.get_parameter(name).detach() for name in names]
    flat = torch.cat([w.flatten() for w in weights])

    def loss(vector):
        parts = vector.split([w.numel() for w in weights])
        given = {n: p.view_as(w) for n, p, w in zip(names, parts, weights, strict=True)}
        return sum(F.cross_entropy(functional_call(model, given, x), y) for x, y in batches)

    flat.requires_grad_(True)
    expected = (flat * (hessian(loss)(flat) @ torch.autograd.grad(loss(flat), flat)[0])).abs()
    torch.testing.assert_close(torch.cat([s.flatten().abs() for s in scores.values()]), expected.detach())


def test_it_prunes_once_when_the_weights_have_settled():
    model = network()
    rate = 0.5
    optimizer = SGD(model.parameters(), lr=rate)
    method = early(pattern=Globally())
    with attach(model, optimizer, method):
        for epoch in range(8):
            optimizer.param_groups[0]["lr"] = rate * 0.3**epoch
            run(model, optimizer, 2 * epoch, 2 * epoch + 2)
            changes = [abs(b - a) for a, b in zip(method.distances, method.distances[1:], strict=False)]
            assert (method.pruned_at is not None) == any(c < 0.2 * method.distances[0] for c in changes)
    assert method.pruned_at is not None
    kept = method.report().values()
    assert sum(k.weights for k in kept) == round(0.2 * sum(k.places for k in kept))
    assert method.threshold == pytest.approx(0.2 * method.distances[0])


@pytest.mark.parametrize("rounds", [None, 3])
def test_it_removes_neurons_and_channels_for_good(rounds):
    torch.manual_seed(0)
    model = resnet((1, 8, 8), 3, depth=8)
    with torch.no_grad():  # without incoming weights a channel has no part in the flow of the gradient
        model.get_submodule("stage1_0.conv1").weight[5] = 0.0
        model.get_submodule("stage1_0.conv1").weight.register_hook(_but(5))
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = torch.randn(12, 64), torch.randint(3, (12,))
    units = [group.units for group in Following(model, x[:2]).groups]
    options = {"density": 0.4, "loss_fn": F.cross_entropy, "batches": [(x, y)], "example": x[:2], "rounds": rounds}
    method = EarlyCroP(**options, every=1, latest=3)
    wide = sum(p.numel() for p in model.parameters())
    with attach(model, optimizer, method):
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    left = [group.units for group in Following(model, x[:2]).groups]
    assert sum(left) == pytest.approx(0.4 * sum(units), abs=1)
    assert min(left) >= 1
    assert sum(p.numel() for p in model.parameters()) < 0.4 * wide
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in model.parameters())
    assert bool((model.get_submodule("stage1_0.conv1").weight != 0).flatten(1).any(1).all())


def _but(channel):
    def hook(gradient):
        gradient = gradient.clone()
        gradient[channel : channel + 1] = 0.0
        return gradient

    return hook


def test_neurons_are_refused_early():
    model = nn.Sequential(nn.Linear(4, 3))
    options = {"density": 0.4, "loss_fn": F.cross_entropy, "batches": [batch(0)], "every": 1}
    with pytest.raises(ValueError, match="no group of hidden neurons"):
        attach(model, SGD(model.parameters(), lr=0.1), EarlyCroP(**options, example=torch.rand(2, 4)))
    with pytest.raises(ValueError, match="not both"):
        EarlyCroP(**options, example=torch.rand(2, 4), pattern=Globally())


def test_it_needs_a_loss_and_batches():
    with pytest.raises(ValueError, match="needs loss_fn="):
        EarlyCroP(density=0.1, batches=[batch(0)], every=1)
    with pytest.raises(ValueError, match="needs training batches="):
        EarlyCroP(density=0.1, loss_fn=F.cross_entropy, every=1)


# -- SCL ------------------------------------------------------------------------------------------------------------


def test_without_a_penalty_or_before_a_gate_closes_it_is_the_baseline():
    models = [network(), network()]
    for model, own in zip(models, ([], [SCL(penalty=0.5, until=100, rate=1e-3)]), strict=True):
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        with attach(model, optimizer, *own):
            run(model, optimizer, 0, 5)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_more_penalty_keeps_less_and_it_says_how_much():
    kept = []
    for penalty in (0.02, 0.2, 2.0):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        scl = SCL(penalty=penalty, until=30, rate=0.1)
        with attach(model, optimizer, scl):
            run(model, optimizer, 0, 40)
        kept.append(sum(k.weights for k in scl.report().values()))
        assert f"keeps {kept[-1]:,} of 608 connections" in str(scl)
        assert sum(int(m.weight.count_nonzero()) for m in model.modules() if isinstance(m, nn.Linear)) == kept[-1]
    assert kept[0] > kept[1] > kept[2] >= 3


def test_a_closed_gate_keeps_its_value_and_opens_where_the_loss_wants_it():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.0]])
    model, scl = nn.Sequential(layer), SCL(penalty=0.0, until=100, rate=0.8)
    optimizer = SGD(model.parameters(), lr=0.0)

    def step(sign: float) -> list[float]:
        optimizer.zero_grad()
        (sign * model(torch.tensor([[1.0, -1.0]]))).sum().backward()
        optimizer.step()
        return layer.weight.tolist()[0]

    with attach(model, optimizer, scl):
        step(1.0)
        assert step(1.0) == [0.0, 1.0]
        assert step(-1.0) == [1.0, 1.0]  # the gradient came through the closed gate


def test_gates_begin_late_and_at_the_size_of_the_values_so_that_small_ones_close_first():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[0.4, 0.1, 0.3, 0.2], [1.0, 3.0, 2.0, 4.0]])
    model, scl = nn.Sequential(layer), SCL(penalty=1.0, start=2, until=100, rate=0.1)
    optimizer, order = SGD(model.parameters(), lr=0.0), [[], []]
    with attach(model, optimizer, scl):
        for step in range(16):
            optimizer.zero_grad()
            model(torch.zeros(1, 4)).sum().backward()  # no gradient: the penalty alone moves gates
            optimizer.step()
            assert step >= 2 or not scl.gates
            for row, found in zip(layer.weight, order, strict=True):
                found += [k for k in (row == 0).nonzero()[:, 0].tolist() if k not in found]
    assert order == [[1, 3, 2], [0, 2, 1]]


# -- Sup-tickets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("presence", [False, True])
def test_the_superposition_is_the_cut_mean_of_the_tickets(presence):
    model = network(sparse=True)
    optimizer = SGD(param_groups(model), lr=0.1, momentum=0.9)
    rewire, tickets = sup_tickets(start=4, cycle=2, tickets=2, every=2)
    dense, held, biases = [], [], []

    def look() -> None:
        if tickets.steps in (4, 6, 8):
            layers = [m for m in model.modules() if isinstance(m, SparseLayer)]
            dense.append([m.to_dense().weight.detach() for m in layers])
            held.append([torch.zeros(m.topology.places).index_fill(0, m.topology.keys(), 1.0) for m in layers])
            biases.append(model[0].bias.detach().clone())

    with attach(model, optimizer, rewire, Watch(look), tickets):
        run(model, optimizer, 0, 10)
    weights = sum(m.weights for m in model.modules() if isinstance(m, SparseLayer))
    assert len(tickets.taken) == 3
    assert all(moved > 0 for moved in rewire.moved.values())
    tickets.superpose_(model, presence=presence)
    layers = [m for m in model.modules() if isinstance(m, SparseLayer)]
    assert sum(m.weights for m in layers) == weights
    means = [torch.stack(parts) for parts in zip(*dense, strict=True)]
    holders = [torch.stack(parts).sum(0).clamp(min=1) for parts in zip(*held, strict=True)]
    means = [m.sum(0) / (h.view(m[0].shape) if presence else 3) for m, h in zip(means, holders, strict=True)]
    bound = torch.cat([m.abs().flatten() for m in means]).sort(descending=True).values[weights - 1]
    for layer, mean in zip(layers, means, strict=True):
        torch.testing.assert_close(layer.to_dense().weight.detach(), torch.where(mean.abs() >= bound, mean, 0.0))
    torch.testing.assert_close(model[0].bias.detach(), torch.stack(biases).mean(0))


def test_tickets_of_nothing_are_refused():
    model = network()
    with pytest.raises(ValueError, match="has no sparse layer"):
        attach(model, SGD(model.parameters(), lr=0.1), SupTickets(start=1, cycle=1))
    with pytest.raises(ValueError, match="there is no ticket yet"):
        SupTickets(start=1, cycle=1).superpose_(network(sparse=True))
    with pytest.raises(ValueError, match="must divide"):
        sup_tickets(start=5, cycle=4, every=2)
