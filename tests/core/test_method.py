import copy
import gc
import warnings
import weakref
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.hooks import RemovableHandle

from noctule import checkpoint
from noctule.core.listeners import listeners_of
from noctule.core.method import Method, attach
from noctule.core.optim import param_groups
from noctule.core.remap import Remap, resize, resize_full
from noctule.core.topology import Topology
from noctule.sparse.layers.sparse_linear import SparseLinear


class SparseStandIn(nn.Module):
    """Somebody else's layer: what the contract asks for, and nothing else."""

    def __init__(self, in_features: int, out_features: int, *, weights: int) -> None:
        super().__init__()
        self.topology = Topology.random((out_features, in_features), weights)
        self.values = nn.Parameter(torch.randn(weights))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.checks, self.hooks = OrderedDict(), OrderedDict()

    def forward(self, x: Tensor) -> Tensor:
        places = self.topology.rows(), self.topology.columns.to(torch.int64)
        return nn.functional.linear(x, x.new_zeros(self.topology.shape).index_put(places, self.values), self.bias)

    def remap_(self, topology: Topology, remap: Remap) -> None:
        for check in self.checks.values():
            check(self, remap)
        old = {"values": self.values, "bias": self.bias}
        for name, before in old.items():
            if (part := remap.of(name)) is None:
                continue
            moved = part.apply(before.detach())
            if part.new_size == part.old_size:
                before.data.copy_(moved)
            else:
                setattr(self, name, nn.Parameter(moved))
            if before.grad is not None:
                getattr(self, name).grad = part.apply(before.grad)
        self.topology = topology
        for hook in self.hooks.values():
            hook(self, old, remap)

    def register_remap_check(self, check) -> RemovableHandle:
        return self._register(self.checks, check)

    def register_remap_hook(self, hook) -> RemovableHandle:
        return self._register(self.hooks, hook)

    def _register(self, hooks, hook) -> RemovableHandle:
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle


class Log(Method):
    """Writes down what it is told, and what it then sees."""

    def __init__(self, name: str = "", log: list[str] | None = None, *, fails_in: str = "", saw=lambda: None) -> None:
        self.name, self.log, self.fails_in, self.saw = name, [] if log is None else log, fails_in, saw
        self.seen, self.remaps = [], []

    def note(self, what: str) -> None:
        self.log.append(what + self.name)
        if what == self.fails_in:
            raise ArithmeticError(f"no {what}")

    def begin(self, model, optimizers):
        self.note("begin")

    def before_step(self):
        self.seen.append(self.saw())
        self.note("before")

    def after_step(self):
        self.seen.append(self.saw())
        self.note("after")

    def remapped(self, layer, remap):
        self.remaps.append((layer, remap))
        self.note("remapped")

    def observe(self, **metrics):
        self.note("observe " + ",".join(f"{key}={value}" for key, value in metrics.items()))

    def end(self):
        self.note("end")

    def state_dict(self):
        return {"log": list(self.log), "x": torch.arange(3)}

    def load_state_dict(self, state):
        self.log[:] = state["log"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def backward(model: nn.Module, *, times: float = 1.0) -> Tensor:
    model.zero_grad()
    loss = (model(torch.ones(4, 3)) ** 2).sum() * times
    loss.backward()
    return loss


def hooks_of(*things) -> int:
    names = (
        "_optimizer_step_pre_hooks",
        "_optimizer_step_post_hooks",
        "checks",
        "hooks",
        "_remap_checks",
        "_remap_hooks",
    )
    return sum(len(getattr(thing, name, ())) for thing in things for name in names)


# ---- the order of things


def test_methods_run_in_order_before_and_reversed_after(model):
    log: list[str] = []
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, Log("1", log), Log("2", log)) as session:
        for _ in range(2):
            backward(model)
            optimizer.step()
        session.observe(validation_loss=0.5)
        assert session.steps == 2
    steps = ["before1", "before2", "after2", "after1"] * 2
    observed = ["observe validation_loss=0.51", "observe validation_loss=0.52"]
    assert log == ["begin1", "begin2", *steps, *observed, "end2", "end1"]
    assert hooks_of(optimizer) == 0
    optimizer.step()
    assert log[-1] == "end1"


def test_before_sees_final_gradients_and_old_weights_after_sees_new_ones(model):
    method = Log(saw=lambda: (model.weight.detach().clone(), model.weight.grad.clone()))
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, method):
        for _ in range(3):  # micro-batches
            (model(torch.ones(4, 3)) ** 2).sum().backward()
        start, gradient = model.weight.detach().clone(), model.weight.grad.clone()
        optimizer.step()
    (weight, seen), (moved, _) = method.seen
    assert method.log == ["begin", "before", "after", "end"]
    assert torch.equal(weight, start)
    assert torch.equal(seen, gradient)
    assert torch.equal(moved, model.weight)
    assert not torch.equal(moved, start)


def test_a_session_without_methods_and_without_with(model):
    optimizer = SGD(model.parameters(), lr=0.1)
    session = attach(model, optimizer)
    backward(model)
    optimizer.step()
    assert session.steps == 1
    session.close()
    session.close()
    assert hooks_of(optimizer) == 0


def test_attached_training_is_training(model):
    plain = copy.deepcopy(model)
    one, other = (AdamW(m.parameters(), lr=0.01) for m in (model, plain))
    with attach(model, one, Method()):
        for _ in range(5):
            backward(model)
            one.step()
    for _ in range(5):
        backward(plain)
        other.step()
    assert torch.equal(model.weight, plain.weight)


# ---- closures


@pytest.mark.parametrize("by", ["position", "keyword"])
@pytest.mark.parametrize(("kind", "evaluations"), [(SGD, 1), (LBFGS, 4)])
def test_a_closure_brings_before_step_once_with_gradients_and_unmoved_weights(model, kind, evaluations, by):
    calls = []
    optimizer = kind(model.parameters(), lr=0.1, **({"max_iter": 4, "tolerance_change": 0} if kind is LBFGS else {}))
    method = Log(saw=lambda: (model.weight.detach().clone(), model.weight.grad is not None, len(calls)))

    def closure():
        calls.append(0)
        return backward(model)

    start = model.weight.detach().clone()
    with attach(model, optimizer, method):
        loss = optimizer.step(closure) if by == "position" else optimizer.step(closure=closure)
    assert len(calls) == evaluations
    (weight, has_gradient, called), (moved, _, _) = method.seen
    assert torch.equal(weight, start)
    assert has_gradient
    assert called == 1
    assert not torch.equal(moved, start)
    assert (
        loss.item() == pytest.approx((model.weight.new_ones(4, 3) @ start.T + 0).square().sum().item(), rel=1)
        or loss > 0
    )


def test_closures_train_as_they_do_alone(model):
    plain = copy.deepcopy(model)
    one, other = (LBFGS(m.parameters(), lr=0.1) for m in (model, plain))
    with attach(model, one, Method()) as session:
        losses = [one.step(lambda: backward(model)).item() for _ in range(3)]
    assert losses == [other.step(lambda: backward(plain)).item() for _ in range(3)]
    assert torch.equal(model.weight, plain.weight)
    assert session.steps == 3


def test_no_closure_by_name_is_no_closure(model):
    optimizer, method = SGD(model.parameters(), lr=0.1), Log()
    with attach(model, optimizer, method):
        backward(model)
        optimizer.step(None)
        optimizer.step(closure=None)
    assert method.log == ["begin", "before", "after", "before", "after", "end"]


# ---- steps within steps, steps that fail


class Twice(SGD):
    """Calls its parent's step, which fires the hooks again."""

    def step(self, closure=None):
        loss = super().step(closure)
        super().step()
        return loss


class Clumsy(SGD):
    """Fails in its parent's step, and survives."""

    def step(self, closure=None):
        try:
            super().step(lambda: 1 / 0)
        except ZeroDivisionError:
            return super().step(closure)


class Around(Optimizer):
    """An optimizer round another, as Lookahead and its like are."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        super().__init__([p for group in base.param_groups for p in group["params"]], {})

    def step(self, closure=None):
        return self.base.step(closure)


@pytest.mark.parametrize("kind", [Twice, Clumsy])
@pytest.mark.parametrize("with_closure", [False, True])
def test_super_step_fires_once(model, kind, with_closure):
    SGD(model.parameters())  # from here on SGD.step itself calls hooks
    optimizer, method = kind(model.parameters(), lr=0.1), Log()
    with attach(model, optimizer, method) as session:
        for _ in range(2):
            backward(model)
            optimizer.step(*[lambda: backward(model)] * with_closure)
    assert method.log == ["begin", "before", "after", "before", "after", "end"]
    assert session.steps == 2


def test_an_optimizer_round_an_attached_one_is_one_round(model):
    base = SGD(model.parameters(), lr=0.1)
    around, method = Around(base), Log()
    with attach(model, [around, base], method) as session:
        for done in (1, 2):
            backward(model)
            around.step()
            assert session.steps == done
    assert method.log == ["begin", "before", "after", "before", "after", "end"]


@pytest.mark.parametrize("kind", [SGD, Twice])
def test_after_a_step_that_raised_the_next_one_works(model, kind):
    SGD(model.parameters())
    optimizer, method = kind(model.parameters(), lr=0.1), Log()
    with attach(model, optimizer, method) as session:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                optimizer.step(lambda: 1 / 0)
        assert method.log == ["begin"]
        try:
            optimizer.step(lambda: 1 / 0)
        except ZeroDivisionError:  # while the traceback keeps the failed frames
            backward(model)
            optimizer.step()
        assert method.log == ["begin", "before", "after"]
        optimizer.step()
    assert method.log[3:] == ["before", "after", "end"]
    assert session.steps == 2


def test_a_method_that_raises_stops_the_step_before_weights_move(model):
    optimizer, method = SGD(model.parameters(), lr=0.1), Log(fails_in="before")
    start = model.weight.detach().clone()
    with attach(model, optimizer, method) as session:
        backward(model)
        for step in (optimizer.step, lambda: optimizer.step(lambda: backward(model))):
            with pytest.raises(ArithmeticError, match="no before"):
                step()
            assert torch.equal(model.weight, start)
        method.fails_in = ""
        optimizer.step()
        assert session.steps == 1
        method.fails_in = "after"
        with pytest.raises(ArithmeticError, match="no after"):
            optimizer.step()
        method.fails_in = ""
        optimizer.step()
    assert method.log == ["begin", *["before"] * 3, "after", *["before", "after"] * 2, "end"]


def test_a_failed_step_leaves_nothing_alive_after_close(model):
    optimizer = SGD(model.parameters(), lr=0.1)
    session = attach(model, optimizer)

    def fail() -> weakref.ref:
        batch = torch.ones(3)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        return weakref.ref(batch)

    batch = fail()
    session.close()
    gc.collect()
    assert batch() is None


# ---- GradScaler


def scaled(kind, model, *, fused):
    optimizer = kind(model.parameters(), lr=0.1, fused=fused)
    return optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**8)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_a_fused_optimizer_on_scaled_gradients_is_refused_with_the_remedy(model, kind):
    optimizer, scaler = scaled(kind, model, fused=True)
    method, start = Log(), model.weight.detach().clone()
    with attach(model, optimizer, method) as session:
        scaler.scale(model(torch.ones(4, 3)).sum()).backward()
        with pytest.raises(RuntimeError, match=r"call scaler\.unscale_\(optimizer\) before scaler\.step\(optimizer\)"):
            scaler.step(optimizer)
        assert torch.equal(model.weight, start)
        scaler.unscale_(optimizer)  # the remedy works at once
        scaler.step(optimizer)
        scaler.update()
        assert session.steps == 1
    assert method.log == ["begin", "before", "after", "end"]
    assert not torch.equal(model.weight, start)


@pytest.mark.parametrize("fused", [False, True])
def test_methods_act_once_per_real_step_with_unscaled_gradients(model, fused):
    optimizer, scaler = scaled(SGD, model, fused=fused)
    method = Log(saw=lambda: model.weight.grad.clone())
    weights = []
    with attach(model, optimizer, method) as session:
        for x in (1.0, float("inf"), 1e38, 1.0):
            optimizer.zero_grad()
            scaler.scale(model(torch.full((1, 3), x)).sum()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            weights.append(model.weight.detach().clone())
        assert session.steps == 2
    assert method.log == ["begin", *["before", "after"] * 2, "end"]
    assert all(torch.equal(gradient, torch.ones(2, 3)) for gradient in method.seen)
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[2], weights[3])


def test_a_fused_optimizer_that_skips_has_had_its_turn(model):
    other = nn.Linear(3, 2)
    both = nn.ModuleList([model, other])
    a, b = (SGD(m.parameters(), lr=0.1, fused=True) for m in both)
    scaler, method = torch.amp.GradScaler("cpu", init_scale=2.0**8), Log()
    with attach(both, [a, b], method) as session:
        for x in (float("inf"), 1.0):
            scaler.scale(model(torch.full((1, 3), x)).sum() + other(torch.ones(1, 3)).sum()).backward()
            for optimizer in (a, b):
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        assert session.steps == 2
    assert method.log == ["begin", *["before", "after"] * 2, "end"]


# ---- several optimizers


def pair() -> tuple[nn.Module, Optimizer, Optimizer]:
    both = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    return both, *(SGD(m.parameters(), lr=0.1) for m in both)


def test_a_round_is_a_step_of_each(model):
    both, a, b = pair()
    method = Log(saw=lambda: [m.weight.detach().clone() for m in both])
    with attach(both, [a, b], method) as session:
        for order in ((a, b), (b, a)):
            backward(both)
            start = [m.weight.detach().clone() for m in both]
            for optimizer in order:
                optimizer.step()
            before, after = method.seen[-2:]
            assert all(map(torch.equal, before, start))
            assert not any(map(torch.equal, after, start))
        assert session.steps == 2
    assert method.log == ["begin", *["before", "after"] * 2, "end"]


def test_an_optimizer_that_steps_again_closes_the_round():
    both, a, b = pair()
    method = Log()
    with attach(both, (a, b), method) as session:
        backward(both)
        for optimizer, log in [
            (a, ["before"]),
            (a, ["before", "after", "before"]),
            (a, ["before", "after", "before", "after", "before"]),
            (b, ["before", "after"] * 3),
            (b, [*["before", "after"] * 3, "before"]),
        ]:
            optimizer.step()
            assert method.log == ["begin", *log]
        assert session.steps == 3
    assert method.log[-3:] == ["before", "after", "end"]
    assert session.steps == 4


def test_a_round_that_failed_is_not_closed_at_exit():
    both, a, b = pair()
    method = Log()
    backward(both)

    def loop() -> None:
        with attach(both, (a, b), method):
            a.step()
            b.step(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        loop()
    assert method.log == ["begin", "before", "end"]
    method.log.clear()
    with attach(both, (a, b), method):
        a.step()
        with pytest.raises(ZeroDivisionError):
            b.step(lambda: 1 / 0)
        b.step()
    assert method.log == ["begin", "before", "after", "end"]


# ---- schedulers, compilation


@pytest.mark.parametrize("first", ["scheduler", "session"])
@pytest.mark.parametrize("make", [lambda o: StepLR(o, 1, 0.5), lambda o: OneCycleLR(o, 1.0, total_steps=9)])
def test_schedulers_work_in_either_order_without_a_warning(model, first, make):
    optimizer, method = SGD(model.parameters(), lr=1.0, momentum=0.5), Log()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = make(optimizer) if first == "scheduler" else None
        with attach(model, optimizer, method) as session:
            scheduler = scheduler or make(optimizer)
            for _ in range(3):
                backward(model)
                optimizer.step()
                scheduler.step()
        optimizer.step()
        scheduler.step()
    assert session.steps == 3
    assert method.log == ["begin", *["before", "after"] * 3, "end"]


@pytest.mark.filterwarnings("error:Dynamo does not know")  # it does not trace what methods do
def test_a_compiled_step_stays_one_step(model):
    optimizer, method = SGD(model.parameters(), lr=0.1), Log(saw=lambda: model.weight.detach().clone())
    with attach(model, optimizer, method) as session:
        step = torch.compile(optimizer.step, backend="eager")
        for _ in range(2):
            backward(model)
            step()
        assert session.steps == 2
    assert method.log == ["begin", *["before", "after"] * 2, "end"]
    assert not torch.equal(*method.seen[:2])


# ---- what is attached


def test_a_trainable_parameter_without_an_optimizer_is_named(model):
    model = nn.Sequential(model, nn.Linear(2, 2))
    optimizer = SGD(model[0].parameters(), lr=0.1)
    method = Log()
    with pytest.raises(
        ValueError, match=r"2 trainable parameters .*: 1\.weight, 1\.bias\. Build the optimizer after convert_"
    ):
        attach(model, optimizer, method)
    assert method.log == []
    assert hooks_of(optimizer) == 0
    model[1].requires_grad_(False)
    attach(model, optimizer, method).close()
    assert method.log == ["begin", "end"]


def test_a_parameter_swapped_out_later_is_noticed_before_weights_move(model):
    model = nn.Sequential(model, nn.Linear(2, 2))
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, Log()) as session:
        backward(model)
        start = model[0].weight.detach().clone()
        model[1] = nn.Linear(2, 2)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"1\.weight, 1\.bias\. Build the optimizer after convert_"):
                optimizer.step()
        assert torch.equal(model[0].weight, start)
        optimizer.add_param_group({"params": model[1].parameters()})
        optimizer.step()
        assert session.steps == 1


def test_an_optimizer_takes_part_in_one_session_at_a_time(model):
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, Method()) as session:
        with pytest.raises(RuntimeError, match=r"SGD is attached already: give all methods to one attach\(\)"):
            attach(model, optimizer, Log())
        backward(model)
        optimizer.step()
        assert session.steps == 1
    attach(model, optimizer, Log()).close()


def test_sessions_of_different_models_nest():
    (one, a, _), (two, b, _) = pair(), pair()
    log: list[str] = []
    with attach(one[0], a, Log("1", log)), attach(two[0], b, Log("2", log)):
        backward(one)
        backward(two)
        a.step()
        b.step()
    assert log == ["begin1", "begin2", "before1", "after1", "before2", "after2", "end2", "end1"]


def test_arguments_in_the_wrong_place_are_named(model):
    optimizer, method = SGD(model.parameters(), lr=0.1), Method()
    for arguments, error, message in [
        ((model, method, optimizer), TypeError, "needs Optimizer objects, got"),
        ((model, optimizer, Method), TypeError, "needs Method objects, got <class"),
        ((model, optimizer, optimizer), TypeError, "needs Method objects, got SGD"),
        ((model, [], method), ValueError, "no optimizer"),
        ((model, [optimizer, optimizer], method), ValueError, "the same Optimizer twice"),
        ((model, optimizer, method, method), ValueError, "the same Method twice"),
    ]:
        with pytest.raises(error, match=message):
            attach(*arguments)
    assert hooks_of(optimizer) == 0


# ---- leaving


def test_an_exception_in_the_block_undoes_everything_and_comes_out(model):
    optimizer, method = SGD(model.parameters(), lr=0.1), Log()
    with pytest.raises(ZeroDivisionError), attach(model, optimizer, method):
        _ = 1 / 0
    assert method.log == ["begin", "end"]
    assert hooks_of(optimizer) == 0


def test_a_begin_that_fails_ends_those_before_it_and_undoes_everything():
    layer = SparseStandIn(3, 2, weights=4)
    optimizer = SGD(layer.parameters(), lr=0.1)
    log: list[str] = []
    with pytest.raises(ArithmeticError, match="no begin"):
        attach(layer, optimizer, Log("1", log), Log("2", log), Log("3", log, fails_in="begin"), Log("4", log))
    assert log == ["begin1", "begin2", "begin3", "end2", "end1"]
    assert hooks_of(optimizer, layer) == 0
    attach(layer, optimizer).close()


def test_an_end_that_fails_keeps_nobody_from_ending():
    layer = SparseStandIn(3, 2, weights=4)
    optimizer = SGD(layer.parameters(), lr=0.1)
    log: list[str] = []
    with pytest.raises(ArithmeticError, match="no end"):
        attach(layer, optimizer, Log("1", log), Log("2", log, fails_in="end"), Log("3", log)).close()
    assert log[3:] == ["end3", "end2", "end1"]
    assert hooks_of(optimizer, layer) == 0


# ---- what is kept


def test_methods_after_one_that_raised_are_called_before_the_next_forward_pass(model, tmp_path):
    optimizer, log = SGD(model.parameters(), lr=0.1), []
    methods = [Log(str(place), log) for place in range(3)]
    methods[1].fails_in = "after"
    with attach(model, optimizer, *methods) as session:

        def step(raises: bool) -> list[str]:
            """The calls in it."""
            log.clear()
            backward(model)
            with pytest.raises(ArithmeticError, match="no after") if raises else nullcontext():
                optimizer.step()
            return [entry for entry in log if "after" in entry]

        assert step(raises=True) == ["after2", "after1"]
        model.eval()(torch.ones(1, 3))
        assert "after0" not in log
        model.train()(torch.ones(1, 3))
        assert log[-1] == "after0"
        assert not model._forward_pre_hooks
        assert step(raises=True) == ["after2", "after1"]
        checkpoint.save(tmp_path / "session", session.state_dict())
        assert step(raises=True) == ["after0", "after2", "after1"]
        session.settle()
        assert log[-1] == "after0"
        step(raises=True)
        log.clear()
        with pytest.raises(ArithmeticError, match="no after"):
            optimizer.step()  # with gradients from elsewhere
        assert log == ["after0", *(f"before{place}" for place in range(3)), "after2", "after1"]
    assert session.steps == 5
    assert not model._forward_pre_hooks
    again = [Log(str(place)) for place in range(3)]
    with attach(model, optimizer, *again) as session:
        state = checkpoint.load(tmp_path / "session")
        with pytest.raises(ValueError, match=r"3 methods, but \[3\] are pending"):
            session.load_state_dict({**state, "pending": [3]})
        session.load_state_dict(state)
        counts = [method.log.count(f"after{place}") for place, method in enumerate(again)]
        model(torch.ones(1, 3))
        assert [method.log.count(f"after{place}") for place, method in enumerate(again)] == [counts[0] + 1, *counts[1:]]
        without = {name: part for name, part in state.items() if name != "pending"}
        session.load_state_dict({**without, "waiting": [0]})  # the older name
        assert model._forward_pre_hooks
        session.load_state_dict(without)
        assert not model._forward_pre_hooks


def test_state_goes_through_a_checkpoint_and_comes_back(model, tmp_path):
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, Log("1"), Method()) as session:
        backward(model)
        optimizer.step()
        checkpoint.save(tmp_path / "session", session.state_dict())
    first, second = Log("1"), Method()
    with attach(model, optimizer, first, second) as session:
        session.load_state_dict(checkpoint.load(tmp_path / "session"))
        assert session.steps == 1
        assert first.log == ["begin1", "before1", "after1"]
        optimizer.step()
        assert session.steps == 2


def test_state_of_other_methods_is_refused_untouched(model):
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, Log()) as session:
        state = session.state_dict()
    method = Log()
    for methods in ((), (Method(),), (method, Method()), (Method(), method)):
        with attach(model, optimizer, *methods) as session:
            with pytest.raises(ValueError, match=r"belongs to the methods \['Log'\], the session has"):
                session.load_state_dict(state)
            assert session.steps == 0
    with attach(model, optimizer, Log()) as session:
        for broken in ({}, {"steps": 1}, {"steps": 1, "methods": [{}]}, {"steps": "x", "methods": []}, None):
            with pytest.raises(ValueError, match=r"not what Session\.state_dict\(\) gave"):
                session.load_state_dict(broken)


# ---- layers whose places change


sparse = pytest.mark.parametrize("kind", [SparseStandIn, SparseLinear])


def rewire(layer: nn.Module, *, weights: int | None = None) -> Remap:
    """Other places, each kept where it can be."""
    generator = torch.Generator().manual_seed(layer.topology.size)
    new = Topology.random(layer.topology.shape, weights or layer.topology.size, generator=generator)
    remap = Remap.between(layer.topology, new)
    layer.remap_(new, remap)
    return remap


@sparse
@pytest.mark.parametrize("weights", [6, 9])
def test_state_follows_then_every_method_is_told(kind, weights):
    layer = kind(3, 4, weights=6)
    model = nn.Sequential(layer)
    optimizer = AdamW(param_groups(model), lr=0.1)
    method = Log()
    with attach(model, optimizer, method) as session:
        backward(model)
        optimizer.step()
        before = {key: state.clone() for key, state in optimizer.state[layer.values].items()}
        old = layer.values
        remap = rewire(layer, weights=weights)
        assert (layer.values is old) == (weights == 6)
        assert 0 < remap.grown < weights
        survivors = before["exp_avg_sq"][remap.old_slot[remap.old_slot >= 0]]
        assert torch.equal(optimizer.state[layer.values]["exp_avg"], remap.apply(before["exp_avg"]))
        assert torch.equal(
            optimizer.state[layer.values]["exp_avg_sq"], remap.apply(before["exp_avg_sq"], survivors.mean())
        )
        assert method.remaps == [(layer, remap)]
        backward(model)
        optimizer.step()
        assert session.steps == 2
    assert hooks_of(layer) == 0
    assert method.log == ["begin", "before", "after", "remapped", "before", "after", "end"]


@sparse
def test_a_change_that_some_optimizer_cannot_follow_is_refused_before_anything_moved(kind):
    layer = kind(3, 4, weights=6)
    optimizers = [Adam([layer.values, layer.bias]), LBFGS([layer.values])]
    method = Log()
    with attach(layer, optimizers, method):
        for weights in (6, 9):
            topology, values, data = layer.topology, layer.values, layer.values.detach().clone()
            with pytest.raises(ValueError, match="LBFGS keeps a history"):
                rewire(layer, weights=weights)
            assert layer.topology is topology
            assert layer.values is values
            assert torch.equal(layer.values, data)
    assert method.remaps == []


@sparse
def test_a_method_may_change_places_at_any_moment(kind):
    layer = kind(3, 4, weights=6)
    model = nn.Sequential(layer)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)

    class Mover(Method):
        def begin(self, model, optimizers):
            rewire(layer, weights=7)

        def before_step(self):
            rewire(layer, weights=8)  # the gradient follows, so that the step is still right

        def after_step(self):
            rewire(layer, weights=6)

        def end(self):
            rewire(layer, weights=5)

    log = Log()
    with attach(model, optimizer, log, Mover()):
        backward(model)
        optimizer.step()
        momentum = optimizer.state[layer.values]["momentum_buffer"]
        assert momentum.shape == (6,)
    assert optimizer.state[layer.values]["momentum_buffer"].shape == (5,)
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [(5,), (4,)]
    assert [remap.new_size for _, remap in log.remaps] == [7, 8, 6, 5]


@sparse
def test_a_layer_that_joined_later_is_followed_too(kind):
    model = nn.Sequential(nn.Linear(3, 3))
    optimizer = Adam(model.parameters())
    method = Log()
    with attach(model, optimizer, method):
        model.append(kind(3, 2, weights=4))
        optimizer.add_param_group({"params": list(model[1].parameters())})
        backward(model)
        optimizer.step()
        rewire(model[1], weights=3)
        assert optimizer.state[model[1].values]["exp_avg"].shape == (3,)
    assert len(method.remaps) == 1
    assert hooks_of(model[1]) == 0


def test_a_copy_of_the_model_is_not_attached():
    model = nn.Sequential(SparseLinear(3, 2, weights=4))
    method = Log()
    with attach(model, Adam(model.parameters()), method):
        average = copy.deepcopy(model)
        rewire(average[0], weights=3)
        assert method.remaps == []
        rewire(model[0], weights=5)
    assert [layer for layer, _ in method.remaps] == [model[0]]


def test_a_compiled_model_is_hooked_once():
    layer = SparseStandIn(3, 2, weights=4)
    optimizer, method = Adam(layer.parameters()), Log()
    with attach(torch.compile(layer), optimizer, method):
        rewire(layer)
    assert len(method.remaps) == 1


def test_a_layer_takes_part_in_one_session_at_a_time():
    layer = SparseStandIn(3, 2, weights=4)
    one, other = SGD(layer.parameters(), lr=0.1), SGD(layer.parameters(), lr=0.1)
    with attach(nn.Sequential(layer), one):
        with pytest.raises(RuntimeError, match="0 is attached already"):
            attach(nn.Sequential(layer), other)
        assert hooks_of(other) == 0


def test_inside_data_parallel_places_may_move_but_their_number_stays(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = SparseStandIn(3, 2, weights=4)
        model = DistributedDataParallel(nn.Sequential(layer))
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        with attach(model, optimizer):
            backward(model)
            optimizer.step()
            rewire(layer)
            with pytest.raises(ValueError, match="from 4 to 3 weights inside DistributedDataParallel"):
                rewire(layer, weights=3)
            assert layer.values.shape == (4,)
            empty = resize(layer.topology, rows=torch.tensor([0, 1, -1]))  # as many weights, one more in the bias
            with pytest.raises(ValueError, match="from 2 to 3 weights inside DistributedDataParallel"):
                layer.remap_(*empty)
            assert layer.bias.shape == (2,)
    finally:
        torch.distributed.destroy_process_group()


# ---- layers whose width changes


@sparse
@pytest.mark.parametrize("rows", [[2, 0], [0, 2, 3], [3, 2, 1, 0], [1, -1, 3, -1, 0]])
def test_the_state_of_the_bias_follows_the_rows(kind, rows):
    layer = kind(3, 4, weights=12)
    model = nn.Sequential(layer)
    optimizer = AdamW(param_groups(model), lr=0.1)
    method = Log()
    with attach(model, optimizer, method) as session:
        backward(model)
        optimizer.step()
        old = layer.bias
        before = {key: state.clone() for key, state in optimizer.state[old].items()}
        gradient = old.grad.clone()
        topology, remap = resize(layer.topology, rows=torch.tensor(rows))
        layer.remap_(topology, remap)
        assert (layer.bias is old) == (len(rows) == 4)
        assert torch.equal(layer.bias.grad, remap.rows.apply(gradient))
        state = optimizer.state[layer.bias]
        assert torch.equal(state["step"], before["step"])
        assert torch.equal(state["exp_avg"], remap.rows.apply(before["exp_avg"]))
        survivors = before["exp_avg_sq"][[row for row in rows if row >= 0]]
        assert torch.equal(state["exp_avg_sq"], remap.rows.apply(before["exp_avg_sq"], survivors.mean()))
        assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
            [id(layer.values)],
            [id(layer.bias)],
        ]
        assert method.remaps == [(layer, remap)]
        optimizer.step()
        assert session.steps == 2
    assert set(optimizer.state) == {layer.values, layer.bias}


@sparse
def test_an_optimizer_that_cannot_follow_the_bias_refuses_before_the_weights_moved(kind):
    layer = kind(3, 4, weights=6)
    optimizers = [Adam([layer.values]), LBFGS([layer.bias])]
    with attach(layer, optimizers, Log()):
        before = layer.topology, layer.values, layer.values.detach().clone(), layer.bias
        with pytest.raises(ValueError, match="LBFGS keeps a history"):
            layer.remap_(*resize(layer.topology, rows=torch.tensor([0, 2])))
        assert (layer.topology, layer.values, layer.bias) == (before[0], before[1], before[3])
        assert torch.equal(layer.values, before[2])
        rewire(layer, weights=6)  # the rows stay, and so does what the bias has


def test_a_session_is_found_by_the_modules_of_its_model(model):
    nested = nn.Sequential(model)
    optimizer = SGD(nested.parameters(), lr=0.1)
    with attach(nested, optimizer) as session:
        assert listeners_of(model) == listeners_of(nested) == [session]
        assert listeners_of(nn.Linear(3, 2)) == []
    assert listeners_of(model) == []


def test_a_dense_module_may_change_too(model):
    optimizer, method = SGD(model.parameters(), lr=0.1, momentum=0.9), Log()
    with attach(model, optimizer, method) as session:
        backward(model)
        optimizer.step()
        remap = resize_full((2, 3), rows=torch.tensor([1]), columns=torch.tensor([0, 2]))
        session.check_remap(model, remap)
        old = dict(model.named_parameters())
        momentum = optimizer.state[model.weight]["momentum_buffer"].clone()
        model.weight = nn.Parameter(model.weight.detach()[[1]][:, [0, 2]])
        model.bias = nn.Parameter(model.bias.detach()[[1]])
        session.remapped(model, old, remap)
        assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], momentum[[1]][:, [0, 2]])
        assert method.remaps == [(model, remap)]
    frozen, lbfgs = model, LBFGS(model.parameters())
    with (
        attach(frozen, lbfgs) as session,
        pytest.raises(ValueError, match="LBFGS keeps a history"),
    ):
        session.check_remap(frozen, resize_full((1, 2), rows=torch.tensor([0])))
