"""Optimizers that hold others, and the orders in which a model, its optimizer and its session load their states."""

import copy
import itertools

import pytest
import torch
from torch import nn

from noctule.core.method import Method, attach
from noctule.core.optim import check_carry, unwrapped
from noctule.sparse.average import ExponentialAverage
from noctule.sparse.layers import SparseLinear
from noctule.sparse.rewire import set_


class Wrapper(torch.optim.Optimizer):
    def __init__(self, inner, **more):
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups = [{"base": inner}], inner.param_groups
        self.__dict__.update(more)

    def step(self, closure=None):
        return self.inner[0]["base"].step(closure)


class Uninitialised(torch.optim.Optimizer):
    def __init__(self, inner):
        self.optimizer = inner
        self.param_groups = inner.param_groups

    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class NoOptimizer:
    def __init__(self, inner):
        self._optimizer = inner

    def step(self):
        self._optimizer.step()


def build(seed: int = 0, weights: int = 60) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(seed)
    layers = [SparseLinear(20, n, weights=w, generator=generator) for n, w in ((20, weights), (3, 30))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(8, 20, generator=generator)).square().sum().backward()
        optimizer.step()


class Counts(Method):
    def __init__(self):
        self.before = self.after = 0

    def before_step(self):
        self.before += 1

    def after_step(self):
        self.after += 1


@pytest.mark.parametrize("wrap", [Wrapper, Uninitialised, NoOptimizer, lambda o: Wrapper(Wrapper(o))])
@pytest.mark.parametrize("who_steps", ["wrapper", "inner"])
def test_a_wrapped_optimizer_trains_as_the_one_inside(wrap, who_steps):
    (plain, optimizer), (model, inner) = build(), build()
    outer, counts = wrap(inner), Counts()
    with attach(plain, optimizer, set_(every=2)):
        train(plain, optimizer, 7, seed=1)
    with attach(model, outer, set_(every=2), counts) as session:
        train(model, outer if who_steps == "wrapper" else inner, 7, seed=1)
    assert (session.steps, counts.before, counts.after) == (7, 7, 7)
    for a, b in zip(plain.state_dict().values(), model.state_dict().values()):
        assert torch.equal(a, b)
    again = attach(model, outer)  # everything is undone
    again.close()
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_load_state_dict_post_hooks


def test_several_wrapped_optimizers_are_one_round():
    model, _ = build()
    optimizers = [Wrapper(torch.optim.SGD(layer.parameters(), lr=0.1)) for layer in (model[0], model[2])]
    with attach(model, optimizers, counts := Counts()) as session:
        for _ in range(3):
            model(torch.randn(4, 20)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert session.steps == counts.before == counts.after == 3


def test_what_holds_no_optimizer_is_refused():
    model, _ = build()
    for thing in (object(), {"lr": 1}, None, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="needs Optimizer objects"):
            attach(model, [thing])
    assert unwrapped(object()) == []


def test_weights_kept_outside_of_the_state_are_refused_at_attach():
    model, inner = build()
    slow = [[p.detach().clone() for p in group["params"]] for group in inner.param_groups]
    with pytest.raises(ValueError, match="Wrapper keeps numbers for these 60 weights in its attribute 'slow_weights'"):
        attach(model, Wrapper(inner, slow_weights=slow), set_(every=2))
    attach(model, Wrapper(inner, slow_weights=slow)).close()  # nothing moves


def test_codes_of_quantised_state_are_refused():
    model, optimizer = build()
    values = model[0].values
    optimizer.state[values]["state1"] = torch.zeros(60, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"'state1'.*quantised"):
        check_carry(optimizer, values)


# -- orders of loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations("mos")), ids="".join)
@pytest.mark.parametrize("weights", [60, 45])
@pytest.mark.parametrize("wrap", [lambda o: o, Wrapper])
def test_states_load_in_any_order_inside_a_session(order, weights, wrap):
    def methods():
        return set_(every=3), ExponentialAverage(0.9)

    model, optimizer = build(0, weights)
    with attach(model, optimizer, *methods()) as session:
        train(model, optimizer, 7, seed=1)
        states = copy.deepcopy({"m": model.state_dict(), "o": optimizer.state_dict(), "s": session.state_dict()})
        train(model, optimizer, 7, seed=2)
        wanted = copy.deepcopy([model.state_dict(), optimizer.state_dict(), session.state_dict()])
    wanted[2] = [entry["state"] for entry in wanted[2]["methods"]]
    ours, own = build(1)  # other places, and where weights=45 another number of them
    with attach(ours, wrap(own), *methods()) as session:
        train(ours, own, 2, seed=5)
        loaders = {"m": ours.load_state_dict, "o": own.load_state_dict, "s": session.load_state_dict}
        for part in order:
            loaders[part](copy.deepcopy(states[part]))
        train(ours, own, 7, seed=2)
        got = [ours.state_dict(), own.state_dict(), [entry["state"] for entry in session.state_dict()["methods"]]]
    torch.testing.assert_close(got, wanted, rtol=0.0, atol=0.0)


def test_a_model_loaded_alone_takes_its_optimizers_state_along_by_place():
    (theirs, _), (model, optimizer) = build(1), build(0)
    with attach(model, optimizer):
        train(model, optimizer, 3, seed=1)
        layer = model[0]
        dense = torch.zeros(400)
        dense[layer.topology.keys()] = optimizer.state[layer.values]["exp_avg"]
        model.load_state_dict(theirs.state_dict())
        assert torch.equal(optimizer.state[layer.values]["exp_avg"], dense[layer.topology.keys()])


def test_a_state_loaded_before_the_last_step_is_of_the_places_of_then():
    model, optimizer = build()
    train(model, optimizer, 3, seed=1)
    with attach(model, optimizer):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer, 1, seed=2)
        layer = model[0]
        dense = torch.zeros(400)
        dense[layer.topology.keys()] = optimizer.state[layer.values]["exp_avg"]
        model.load_state_dict(build(1)[0].state_dict())
        assert torch.equal(optimizer.state[layer.values]["exp_avg"], dense[layer.topology.keys()])
