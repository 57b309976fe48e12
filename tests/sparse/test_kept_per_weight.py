"""What is kept for each weight is what a dense masked twin keeps, whatever the layer, optimizer, method and wrapper."""

import pytest
import schedulefree
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples import examples
from noctule.core.method import attach
from noctule.sparse.average import ExponentialAverage
from noctule.sparse.follow import follow
from noctule.sparse.layers import SparseConv2d, SparseLayer, SparseLinear
from noctule.sparse.rewire import ctre, gse, rigl, set_
from noctule.sparse.rewire.decay import Decay

DECAY = 0.8


class Lookahead(torch.optim.Optimizer):
    """As those that are around: the groups are shared, the state is its own, slow weights are in it."""

    def __init__(self, inner: torch.optim.Optimizer, every: int = 3) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.every, self.count, self.param_groups = inner, every, 0, inner.param_groups

    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow_params", p.detach().clone())
                if self.count % self.every == 0:
                    slow.lerp_(p.detach(), 0.5)
                    p.data.copy_(slow)
        return loss


class Prepared(torch.optim.Optimizer):
    """As accelerate's: never initialised as an optimizer, it shows what the one inside has."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class Held:
    """As Lightning's: no optimizer at all, it has one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.__dict__["_optimizer"], name)


class Sam(torch.optim.Optimizer):
    """Only the base optimizer's step is ever called, at the gradient of a point nearby."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base, self.param_groups = base, base.param_groups

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
        self.base.step()


def training(optimizer):
    optimizer.train()
    return optimizer


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "schedule-free sgd": lambda p: training(schedulefree.SGDScheduleFree(p, lr=0.05, warmup_steps=2)),
    "schedule-free adam": lambda p: training(schedulefree.AdamWScheduleFree(p, lr=0.01, weight_decay=0.01)),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
}
METHODS = {
    "set": lambda seed: set_(every=2, fraction=0.4, seed=seed),
    "rigl": lambda seed: rigl(every=2, until=50, fraction=0.4, seed=seed),
    "gse": lambda seed: gse(every=3, fraction=0.4, seed=seed),
    "ctre": lambda seed: ctre(every=2, fraction=0.4, seed=seed),
}
WRAPPERS = {"plain": lambda o: o, "lookahead": Lookahead, "prepared": Prepared, "held": Held, "sam": Sam}
NOT_SIGNED = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf"}


class Twin:
    """One dense layer, its mask, and an optimizer whose state is masked like the weights, by hand."""

    def __init__(self, layer: SparseLayer, make, wrap) -> None:
        self.layer, self.topology = layer, layer.topology
        self.parameters = [nn.Parameter(self.dense(layer.values.detach()))]
        if layer.bias is not None:
            self.parameters.append(nn.Parameter(layer.bias.detach().clone()))
        self.inner = make(self.parameters)
        self.optimizer = wrap(self.inner)
        self.average = [p.detach().clone() for p in self.parameters]

    def dense(self, values: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(self.topology.places, dtype=values.dtype)
        out[self.topology.keys()] = values
        return out

    def step(self, decay: float) -> None:
        self.parameters[0].data.mul_(1 - decay)
        self.parameters[0].grad = self.dense(self.layer.values.grad)
        for p in self.parameters[1:]:
            p.grad = self.layer.bias.grad.clone()
        self.optimizer.step()

    def move(self) -> None:
        """The mask changed: what is gone is zero, what is new is neutral."""
        old, new = self.topology.keys(), self.layer.topology.keys()
        stays, grown = new[torch.isin(new, old)], new[~torch.isin(new, old)]
        self.topology = self.layer.topology
        p = self.parameters[0]
        for optimizer in {
            id(o): o for o in (self.inner, self.optimizer) if isinstance(o, torch.optim.Optimizer)
        }.values():
            for key, x in optimizer.state.get(p, {}).items():
                if isinstance(x, torch.Tensor) and x.shape == p.shape:
                    kept = torch.zeros_like(x)
                    kept[stays] = x[stays]
                    kept[grown] = x[stays].mean() if key in NOT_SIGNED else 0.0
                    x.copy_(kept)
        for x in (p.data, self.average[0]):
            kept = torch.zeros_like(x)
            kept[stays] = x[stays]
            x.copy_(kept)

    def states(self) -> dict[str, torch.Tensor]:
        found = {}
        for optimizer in (self.inner, self.optimizer):
            for key, x in getattr(optimizer, "state", {}).get(self.parameters[0], {}).items():
                if isinstance(x, torch.Tensor) and x.shape == self.parameters[0].shape:
                    found[key] = x
        return found


@pytest.mark.wide
@settings(max_examples=examples(200), deadline=None)
@given(
    kind=st.sampled_from(["linear", "no bias", "convolution"]),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    method=st.sampled_from(sorted(METHODS)),
    wrapper=st.sampled_from(sorted(WRAPPERS)),
    decay=st.sampled_from([0.0, 0.1]),
    accumulate=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
def test_what_is_kept_for_each_weight_is_what_a_dense_masked_twin_keeps(
    kind, optimizer, method, wrapper, decay, accumulate, seed
):
    if method == "ctre" and kind == "convolution":
        method = "set"
    generator = torch.Generator().manual_seed(seed)
    if kind == "convolution":
        layer = SparseConv2d(2, 4, 3, density=0.4, generator=generator)
        draw = lambda: torch.randn(2, 2, 5, 5, generator=generator)  # noqa: E731
    else:
        layer = SparseLinear(9, 7, density=0.3, bias=kind == "linear", generator=generator)
        draw = lambda: torch.randn(6, 9, generator=generator)  # noqa: E731
    model = nn.Sequential(layer)
    parameters = list(model.parameters())
    made, wrap = OPTIMIZERS[optimizer], WRAPPERS[wrapper]
    inner = made(parameters)
    ours = wrap(inner)
    twin = Twin(layer, made, wrap)
    anchor = {"0.values": layer.values.detach().clone()}
    dense_anchor = twin.dense(anchor["0.values"])
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.n_averaged += 1  # it begins as what it was copied from, as ours does
    follow(averaged.module, model)
    follow(anchor, model)
    methods = [METHODS[method](seed), average := ExponentialAverage(DECAY), *([Decay(decay)] if decay else [])]
    with attach(model, ours, *methods) as session:
        for _ in range(7):
            ours.zero_grad()
            for _ in range(accumulate):
                (model(draw()).square().mean() / accumulate).backward()
            twin.step(decay)
            ours.step()
            twin.average = [DECAY * a + (1 - DECAY) * p.detach() for a, p in zip(twin.average, twin.parameters)]
            if layer.topology != twin.topology:
                twin.move()
                dense_anchor *= twin.dense(torch.ones(layer.weights))
            with torch.no_grad():
                averaged.update_parameters(model)
    assert session.steps == 7
    keys = layer.topology.keys()
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(layer.values.detach(), twin.parameters[0].detach()[keys], **close)
    states = {key: x for o in (inner, ours) for key, x in o.state.get(layer.values, {}).items()}
    for key, dense in twin.states().items():
        torch.testing.assert_close(states[key], dense[keys], **close)
    assert average.model[0].topology == averaged.module[0].topology == layer.topology
    torch.testing.assert_close(average.model[0].values.detach(), twin.average[0][keys], **close)
    if layer.bias is not None:
        torch.testing.assert_close(average.model[0].bias.detach(), twin.average[1], **close)
    torch.testing.assert_close(anchor["0.values"], dense_anchor[keys], **close)
