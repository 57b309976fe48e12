"""Only the passes of a step that was made say where connections grow: any other leaves the places as they are without it."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

from noctule import attach, ctre, gse, rigl
from noctule.sparse.layers import SparseConv2d, SparseLinear

METHODS = {
    "rigl": lambda: rigl(every=3, until=100, seed=1),
    "gse": lambda: gse(every=3, seed=1),
    "ctre": lambda: ctre(every=3, seed=1),
    "ctre, sampled": lambda: ctre(every=3, seed=1, exact=False, candidates=2.0),
}
STEPS = 7


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(SparseLinear(24, 20, density=0.2), nn.ReLU(), SparseLinear(20, 6, density=0.4))


def sent(model: nn.Module) -> nn.Module:
    """As to another process."""
    return pickle.loads(ForkingPickler.dumps(model))


def batch(seed: int, size: int = 8) -> torch.Tensor:
    return torch.randn(size, 24, generator=torch.Generator().manual_seed(seed))


def places(model: nn.Module) -> list[list[int]]:
    return [m.topology.keys().tolist() for m in model.modules() if isinstance(m, SparseLinear | SparseConv2d)]


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - 1.0).square().mean()


def train(method, *, before=None, between=None, after=None, micro: int = 2, zero=True) -> list[list[int]]:
    """Seven steps of some micro-batches each, with something else done before, between or after their passes."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with attach(model, optimizer, method()):
        for step in range(STEPS):
            if before is not None:
                before(model, optimizer)
            optimizer.zero_grad(set_to_none=zero)
            for part in range(micro):
                if part and between is not None:
                    between(model, optimizer)
                (loss_of(model, batch(10 * step + part)) / micro).backward()
            optimizer.step()
            if after is not None:
                after(model, optimizer)
    return places(model)


def saliency(model, optimizer):
    x = batch(991).requires_grad_()
    assert torch.autograd.grad(loss_of(model, x), x)[0].any()


def gradient_of_weights(model, optimizer):
    assert torch.autograd.grad(loss_of(model, batch(992)), list(model.parameters()))[0].any()


def fisher(model, optimizer):
    loss_of(model, batch(993)).backward()
    optimizer.zero_grad()


def fisher_to_zeros(model, optimizer):
    loss_of(model, batch(994)).backward()
    optimizer.zero_grad(set_to_none=False)


def by_hand(model, optimizer):
    loss_of(model, batch(995)).backward()
    for p in model.parameters():
        p.grad = None


def evaluation(model, optimizer):
    model.eval()
    (loss_of(model, batch(996)) * 100).backward()
    model.train().zero_grad()


def left_in_the_gradient(model, optimizer):
    """Which the next zero_grad takes away."""
    loss_of(model, batch(997)).backward()


def of_an_input(model, optimizer):
    x = batch(998).requires_grad_()
    loss_of(model, x).backward(inputs=[x])


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(
    ("when", "what"),
    [
        ("before", saliency),
        ("before", fisher),
        ("before", fisher_to_zeros),
        ("before", by_hand),
        ("before", evaluation),
        ("before", left_in_the_gradient),
        ("before", of_an_input),
        ("between", saliency),
        ("between", gradient_of_weights),
        ("between", of_an_input),
        ("after", gradient_of_weights),
        ("after", fisher),
        ("after", left_in_the_gradient),
    ],
)
def test_another_pass_leaves_no_trace(method, zero, when, what):
    wanted = train(method, zero=zero)
    assert wanted != places(network())
    assert train(method, zero=zero, **{when: what}) == wanted


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("how", ["scaler", "guard", "guard before"])
def test_a_step_that_was_skipped_never_was(method, zero, how):
    def run(skipped: bool) -> list[list[int]]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6, enabled=how == "scaler")
        with attach(model, optimizer, method()) as session:
            for step in range(STEPS):
                for bad in [True, False] if skipped and step % 3 == 2 else [False]:
                    if how != "guard before":
                        optimizer.zero_grad(set_to_none=zero)
                    loss = loss_of(model, batch(999 if bad else step)) * (torch.inf if bad else 1.0)
                    scaler.scale(loss).backward()
                    norm = nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
                    if how != "scaler" and not norm.isfinite():
                        optimizer.zero_grad(set_to_none=zero)
                        continue
                    scaler.step(optimizer)
                    scaler.update(1.0)
                    if how == "guard before":
                        optimizer.zero_grad(set_to_none=zero)
        assert session.steps == STEPS
        return places(model)

    assert run(True) == run(False)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_micro_batches_are_one_batch_whatever_is_done_to_their_gradient(method):
    def run(parts: int, rescale: bool) -> list[list[int]]:
        torch.manual_seed(0)
        model = network().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with attach(model, optimizer, method()):
            for step in range(STEPS):
                optimizer.zero_grad()
                for x in batch(step).double().chunk(parts):
                    (loss_of(model, x) / parts).backward()
                    if rescale:
                        for p in model.parameters():
                            p.grad.mul_(2.0).mul_(0.5)
                optimizer.step()
        return places(model)

    assert run(4, False) == run(4, True) == run(1, False)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("zeroed", [True, False])
def test_passes_of_another_optimizers_step_do_not_count(method, zeroed):
    """As a discriminator's gradient in the generator's step."""

    def run(generator_steps: bool) -> list[list[int]]:
        critic, generator = network(), nn.Linear(24, 24)
        both = nn.ModuleList([critic, generator])
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (critic, generator)]
        with attach(both, optimizers, method()):
            for step in range(STEPS):
                both.zero_grad()
                loss_of(critic, batch(step)).backward()
                optimizers[0].step()
                if zeroed:
                    both.zero_grad()
                if generator_steps:
                    loss_of(critic, generator(batch(100 + step))).backward()
                optimizers[1].step()
        return places(critic)

    assert run(True) == run(False)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_the_pass_at_a_perturbed_point_is_the_one_that_counts(method):
    """SAM: a pass, weights moved and gradients zeroed, a second pass, weights moved back and stepped."""

    def run(first: bool) -> list[list[int]]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        parameters = list(model.parameters())
        with attach(model, optimizer, method()):
            for step in range(STEPS):
                if first:
                    loss_of(model, batch(500 + step)).backward()
                old = [p.detach().clone() for p in parameters]
                noise = torch.Generator().manual_seed(step)
                with torch.no_grad():
                    for p in parameters:
                        p.add_(0.01 * torch.randn(p.shape, generator=noise))
                optimizer.zero_grad()
                loss_of(model, batch(step)).backward()
                with torch.no_grad():
                    for p, before in zip(parameters, old, strict=True):
                        p.copy_(before)
                optimizer.step()
                optimizer.zero_grad()
        return places(model)

    assert run(True) == run(False)


@pytest.mark.parametrize("method", [METHODS["rigl"], METHODS["gse"]], ids=["rigl", "gse"])
@pytest.mark.parametrize("attached", ["before the hooks", "after the hooks"])
def test_optimizers_that_step_in_the_backward_pass(method, attached):
    def step_at_once(model, optimizers):
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda q: [optimizers[q].step(), optimizers[q].zero_grad()][0])

    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    with attach(plain, optimizer, method()):
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(plain, batch(step)).backward()
            optimizer.step()
    model = network()
    optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}
    if attached == "after the hooks":
        step_at_once(model, optimizers)
    with attach(model, list(optimizers.values()), method()) as session:
        if attached == "before the hooks":
            step_at_once(model, optimizers)
        for step in range(STEPS):
            loss_of(model, batch(step)).backward()
    assert session.steps == STEPS
    assert places(model) == places(plain)


def test_a_layer_used_twice_is_seen_twice():
    class Twice(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.first = SparseLinear(24, 24, density=0.2, generator=torch.Generator().manual_seed(0))
            self.shared = shared

        def forward(self, x):
            return self.first(self.first(x).relu())

    model = Twice(True)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with attach(model, optimizer, rigl(every=1, until=100, seed=1)):
        for step in range(2):
            dense = twin.first.to_dense()
            hidden = dense(batch(step)).relu()
            (dense(hidden) - 1.0).square().mean().backward()
            steep = dense.weight.grad.abs().flatten()
            before = model.first.topology.keys()
            optimizer.zero_grad()
            loss_of(model, batch(step)).backward()
            optimizer.step()
            after = model.first.topology.keys()
            grown = after[~torch.isin(after, before)]
            missing = torch.ones(576, dtype=torch.bool).index_fill(0, before, False)
            assert grown.numel()
            assert steep[grown].min() >= steep[missing].topk(grown.numel()).values.min() - 1e-7
            twin.load_state_dict(model.state_dict())


def test_a_convolution_is_seen_as_a_linear_layer_is():
    def run(analysis: bool) -> list[list[int]]:
        torch.manual_seed(0)
        model = nn.Sequential(SparseConv2d(2, 5, 3, density=0.3), nn.Flatten(), SparseLinear(45, 3, density=0.3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(1)
        with attach(model, optimizer, gse(every=2, seed=1)):
            for _ in range(5):
                x = torch.randn(4, 2, 5, 5, generator=generator)
                if analysis:
                    (model(x.flip(0)) * 9).sum().backward()
                optimizer.zero_grad()
                model(x).square().mean().backward()
                if analysis:
                    torch.autograd.grad(model(-x).sum(), list(model.parameters()))
                optimizer.step()
        return places(model)

    assert run(True) == run(False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), sent], ids=["copy", "pickle", "sent"]
)
def test_a_copy_of_a_model_that_is_watched_is_a_plain_one(how):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with attach(model, optimizer, rigl(every=1, until=100)):
        loss_of(model, batch(0)).backward()
        other = how(model)
        assert other[0].watch is None
        assert torch.equal(other(batch(1)), model(batch(1)))
        loss_of(other, batch(1)).backward()
        optimizer.step()


def test_everything_is_undone():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        with attach(model, optimizer, rigl(every=1, until=100)):
            assert model[0].watch is not None
            loss_of(model, batch(0)).backward()
    assert all(layer.watch is None for layer in (model[0], model[2]))
    assert not model[0].values._backward_hooks
    assert not model[0].values._post_accumulate_grad_hooks
