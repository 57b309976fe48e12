"""Fake quantisation, mixed precision, one bit: what is trained is what is stored."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from noctule.compress.quantize import (
    FakeQuantize,
    FakeQuantized,
    Int8Layer,
    StaticInt8,
    WeightOnly,
    WeightOnlyLayer,
    calibrate,
    choose_bits,
    dequantize_weight,
    quantize_weight,
    sensitivity,
    weight_bytes,
)
from noctule.core.convert import convert_
from noctule.core.method import Method, attach
from noctule.data import load
from noctule.sparse.layers import ToSparse


def network(sparse: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    if sparse:
        convert_(model, ToSparse(density=0.5))
    return model


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load("digits")
    part = data.train
    return part.inputs[:512], part.targets[:512]


def train(model: nn.Module, steps: int, lr: float = 0.003) -> float:
    x, y = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    loss = torch.zeros(())
    with attach(model, optimizer, Method()):
        for step in range(steps):
            part = slice(step % 4 * 128, step % 4 * 128 + 128)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[part]), y[part])
            loss.backward()
            optimizer.step()
    model.eval()
    return loss.item()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("activation_bits", [8, 7])
def test_integers_compute_what_was_trained(sparse, activation_bits):
    model, (x, _) = network(sparse), digits()
    convert_(model, FakeQuantize(narrowest=1, activation_bits=activation_bits))
    losses = train(model, 1), train(model, 30, lr=0.01)
    assert losses[1] < 0.8 * losses[0]
    expected = model(x)
    convert_(model, StaticInt8())
    kinds = [type(m) for m in model if isinstance(m, FakeQuantized | Int8Layer)]
    assert kinds == [Int8Layer] * 4
    got = model(x)
    # a rounding tie may fall to the other side, which moves an activation by one step
    assert (got - expected).abs().median().item() < 1e-5 * expected.abs().max().item()
    assert (got - expected).abs().max().item() < 0.05 * expected.abs().max().item()


@pytest.mark.parametrize("bits", [4, 1])
def test_few_bits_that_were_trained_are_stored(bits):
    model, (x, _) = network(), digits()
    convert_(model, FakeQuantize(bits=bits, activations=False))
    losses = train(model, 1), train(model, 40, lr=0.01)
    assert losses[1] < 0.8 * losses[0]
    expected = model(x)
    convert_(model, WeightOnly())
    assert [m.bits for m in model if isinstance(m, WeightOnlyLayer)] == [bits] * 4
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_straight_through():
    layer = nn.Linear(20, 16)
    model = nn.Sequential(layer)
    x = torch.randn(7, 20)
    convert_(model, FakeQuantize(bits=1, activations=False))
    model(x).square().sum().backward()
    rounded = dequantize_weight(*quantize_weight(layer.weight, 1)).requires_grad_()
    F.linear(x, rounded, layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, rounded.grad)


def test_weights_of_one_bit_are_clipped_in_training_only():
    model = nn.Sequential(nn.Linear(20, 16))
    with torch.no_grad():
        model[0].weight[0, 0] = 3.0
    convert_(model, FakeQuantize(bits=1, activations=False))
    model.eval()(torch.ones(1, 20))
    assert model[0].layer.weight[0, 0] == 3.0
    model.train()(torch.ones(1, 20))
    assert model[0].layer.weight[0, 0] == 1.0


def test_inputs_out_of_range_get_no_gradient():
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    ranges = calibrate(model, [torch.linspace(-1.0, 1.0, 16)[None]])
    convert_(model, FakeQuantize(ranges=ranges))
    x = torch.linspace(-2.0, 2.0, 16)[None].requires_grad_()
    model.eval()(x).sum().backward()
    assert torch.equal(x.grad[0] != 0.0, x[0].abs() < 1.01)


def test_ranges_are_moving_averages():
    model = nn.Sequential(nn.Linear(16, 16))
    convert_(model, FakeQuantize(momentum=0.25))
    model(torch.linspace(-1.0, 3.0, 16)[None])
    model(torch.linspace(-5.0, 3.0, 16)[None])
    assert model[0].range.tolist() == [-2.0, 3.0]
    before = model[0].range.clone()
    model.eval()(torch.full((1, 16), 50.0))
    assert torch.equal(model[0].range, before)


def test_a_layer_that_learns_in_few_bits_is_not_wrapped_again():
    model = convert_(nn.Sequential(nn.Linear(16, 16)), FakeQuantize()).model
    with pytest.warns(UserWarning, match="learns in few bits already"):
        convert_(model, FakeQuantize())
    assert type(model[0].layer) is nn.Linear


def test_a_bfloat16_network_learns_in_few_bits():
    model = convert_(nn.Sequential(nn.Linear(16, 16)), FakeQuantize()).model.bfloat16()
    model(torch.randn(4, 16, dtype=torch.bfloat16)).sum().backward()
    assert model[0].layer.weight.grad.abs().sum() > 0


def test_training_resumes_from_a_state_as_if_it_had_not_stopped():
    def start() -> nn.Module:
        return convert_(network(), FakeQuantize()).model

    whole, parts, later = start(), start(), start()
    x, y = digits()

    def steps(model: nn.Module, first: int, last: int) -> None:
        for step in range(first, last):
            loss = F.cross_entropy(model(x[step * 50 : step * 50 + 50]), y[step * 50 : step * 50 + 50])
            for p, g in zip(model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True):
                p.data -= 0.05 * g

    steps(whole, 0, 6)
    steps(parts, 0, 3)
    later.load_state_dict(parts.state_dict())
    steps(later, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), later.state_dict().values(), strict=True))


def test_what_cannot_be_stored_later_is_refused():
    with pytest.raises(ValueError, match="activations=False"):
        FakeQuantize(bits=4)
    model = convert_(nn.Sequential(nn.Linear(16, 16)), FakeQuantize()).model.eval()
    with pytest.raises(ValueError, match="no batch was seen"):
        model(torch.ones(1, 16))
    with pytest.raises(ValueError, match="StaticInt8 needs ranges"):
        convert_(model, StaticInt8())
    with pytest.warns(UserWarning, match=r"StaticInt8\(\)"):
        convert_(model, WeightOnly())


def test_a_layer_that_saw_no_batch_stays_and_is_named():
    model = convert_(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), FakeQuantize()).model
    model[0](torch.ones(2, 16))
    done = convert_(model.eval(), StaticInt8())
    assert list(done.changed) == ["0"]
    assert "saw no batch" in done.left["1"]


# -- mixed precision --------------------------------------------------------------------------------------------------


def test_sensitivity_grows_as_bits_fall_and_changes_no_weight():
    model, (x, y) = network(), digits()
    train(model, 30, lr=0.01)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    harms = sensitivity(model, [x])
    assert list(harms) == ["1", "3", "6", "8"]
    assert all(harm[8] < harm[4] < harm[1] for harm in harms.values())
    by_loss = sensitivity(model, [(x, y)], bits=[8, 1], loss=F.cross_entropy)
    assert all(0.0 <= harm[8] < harm[1] for harm in by_loss.values())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("budget", [3000, 6000, 12_000, 30_000])
def test_the_choice_is_the_best_of_all(budget):
    model = network()
    generator = torch.Generator().manual_seed(budget)
    harms = {
        name: dict(zip((8, 4, 1), sorted(torch.rand(3, generator=generator).tolist()), strict=True))
        for name in ("1", "3", "6", "8")
    }
    chosen = choose_bits(model, harms, budget)

    def taken(bits):
        return sum(weight_bytes(model.get_submodule(n), b) for n, b in zip(harms, bits, strict=True))

    def harm(bits):
        return sum({32: 0.0, **harms[n]}[b] for n, b in zip(harms, bits, strict=True))

    own = [chosen.get(name, 32) for name in harms]
    assert taken(own) <= budget
    room = budget * (1 - 4 / 2048)  # each layer is rounded up to a part of the budget
    best = min(harm(bits) for bits in itertools.product((32, 8, 4, 1), repeat=4) if taken(bits) <= room)
    assert harm(own) <= best
    expected = taken(own)
    convert_(model, WeightOnly(bits=chosen))
    stored = sum(m.codes.nbytes + m.scales.nbytes for m in model if isinstance(m, WeightOnlyLayer))
    rest = sum(m.weight.nbytes for m in model if isinstance(m, nn.Linear | nn.Conv2d))
    assert stored + rest == expected


def test_a_budget_that_holds_nothing_is_refused():
    model = network()
    harms = sensitivity(model.eval(), [digits()[0][:20]])
    with pytest.raises(ValueError, match="100 do not hold these layers: the smallest choices take"):
        choose_bits(model, harms, 100)
    with pytest.raises(ValueError, match="another model"):
        choose_bits(nn.Sequential(nn.Linear(2, 2)), harms, 10_000)
    with pytest.raises(ValueError, match="no batch"):
        sensitivity(model, [])
    with pytest.raises(ValueError, match="targets"):
        sensitivity(model, [torch.ones(2, 64)], loss=F.cross_entropy)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        sensitivity(model.train(), [torch.ones(2, 64)])
