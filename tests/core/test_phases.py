"""Methods that follow one another: what each phase sees, and resuming in each of them."""

import copy
from contextlib import ExitStack

import pytest
import torch
from moving_jobs import places, sparse
from push_pull_jobs import MOMENTUM, batch, network, train

from noctule import set_
from noctule.core.errors import ExchangeError, LostWorkerError
from noctule.core.exchange import Channel
from noctule.core.method import Method, attach
from noctule.core.phases import Phases
from noctule.core.remap import exchange
from noctule.data import Dataset
from noctule.exchange import Local
from noctule.parallel import DiLoCo, PushPull
from noctule.parallel.server.listen import serve
from noctule.train.fit import evaluate


class Noted(Method):
    """Writes down what it hears."""

    def __init__(self, name, log, fails=""):
        self.name, self.log, self.fails, self.steps = name, log, fails, 0

    def _note(self, what):
        self.log.append(f"{self.name} {what}")
        if what == self.fails:
            raise RuntimeError(f"{self.name} failed")

    def begin(self, model, optimizers):
        self._note("begin")

    def before_step(self):
        self._note("before")

    def after_step(self):
        self.steps += 1
        self._note("after")

    def remapped(self, layer, remap):
        self._note("remapped")

    def observe(self, **metrics):
        self._note(f"observe {metrics['loss']}")

    def settle(self):
        self._note("settle")

    def end(self):
        self._note("end")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Stumbles(Method):
    """Fails once, at a step of all phases together, and writes down where it was to make up for it."""

    def __init__(self, heard, at, made_up=None):
        self.heard, self.at, self.made_up = heard, at, [] if made_up is None else made_up

    def after_step(self):
        self.heard.append(self)
        if len(self.heard) == self.at:
            raise LostWorkerError("somebody is away")

    def settle(self):
        self.made_up.append(len(self.heard))


def run(phases, steps, start=0, model=None):
    model = network() if model is None else model
    optimizer = MOMENTUM(model.parameters())
    with attach(model, optimizer, phases):
        train(model, optimizer, [batch(0, n) for n in range(start, start + steps)])
    return model


def test_each_phase_sees_its_own_steps_in_the_order_of_attach():
    log: list[str] = []
    a, b, c = (Noted(name, log) for name in "abc")
    run(Phases([a, b], [c], until=[2]), 3)
    step = ["a before", "b before", "b after", "a after"]
    assert log == ["a begin", "b begin", *step, *step, "b end", "a end", "c begin", "c before", "c after", "c end"]


def test_an_empty_phase_and_one_that_is_never_reached():
    log: list[str] = []
    run(Phases([], [Noted("a", log)], [Noted("b", log)], until=[2, 5]), 4)
    assert log == ["a begin", *["a before", "a after"] * 2, "a end"]


def test_what_is_said_goes_to_the_phase_that_runs():
    log: list[str] = []
    model = sparse()
    optimizer = MOMENTUM(model.parameters())
    phases = Phases([Noted("a", log)], [Noted("b", log)], until=[1])
    with attach(model, optimizer, phases) as session:
        session.observe(loss=0)  # nobody is there yet
        for n in range(2):
            train(model, optimizer, [batch(0, n)])
            log.clear()
            session.observe(loss=n)
            session.settle()
            old = model[0].topology
            model[0].remap_(*exchange(old, torch.tensor([0]), old.missing(1)))
            assert log == [f"b observe {n}", "b settle", "b remapped"]


def test_the_first_phase_begins_with_the_first_forward_pass():
    log: list[str] = []
    model = network()
    with attach(model, MOMENTUM(model.parameters()), Phases([Noted("a", log)], [], until=[1])):
        assert log == []
        evaluate(model, Dataset(torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64), name="none", classes=3))
        model(torch.zeros(2, 6))
        assert log == ["a begin"]
    log.clear()
    inner = torch.nn.Sequential(model)  # a model that is not called itself, but what is in it
    optimizer = MOMENTUM(inner.parameters())
    with attach(inner, optimizer, Phases([Noted("a", log)], [], until=[1])):
        train(model, optimizer, [batch(0, 0)])
        assert log == ["a begin", "a before", "a after", "a end"]
    assert not model._forward_pre_hooks
    assert not inner._forward_pre_hooks


@pytest.mark.parametrize("fails", ["begin", "end"])
def test_whoever_has_begun_ends_whatever_happens(fails):
    log: list[str] = []
    several = [Noted("a", log), Noted("b", log, fails=fails), Noted("c", log)]
    with pytest.raises(RuntimeError, match="b failed"):
        run(Phases(several, [Noted("d", log)], until=[1]), 2)
    begun = ["a begin", "b begin"] if fails == "begin" else ["a begin", "b begin", "c begin"]
    ended = ["a end"] if fails == "begin" else ["c end", "b end", "a end"]
    assert [line for line in log if "begin" in line or "end" in line] == begun + ended


@pytest.mark.parametrize("stop", range(1, 9))
def test_resuming_is_never_having_stopped_in_every_phase(stop):
    """Stopped before, at and after the changes, with moving connections and a strategy that keeps much."""

    def phases():
        path = Local.together(1)[0]
        return Phases(
            [set_(every=2, seed=1)],
            [set_(every=3, seed=2), DiLoCo(Channel(path=path), every=2)],
            [set_(every=2, seed=3)],
            until=[3, 6],
        )

    whole = run(phases(), 9, model=sparse())
    model = sparse()
    optimizer = MOMENTUM(model.parameters())
    with attach(model, optimizer, phases()) as session:
        train(model, optimizer, [batch(0, n) for n in range(stop)])
        saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), session.state_dict()])
    again = sparse(seed=5)
    optimizer = MOMENTUM(again.parameters())
    with attach(again, optimizer, phases()) as session:
        again.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        session.load_state_dict(saved[2])
        waiting = session.state_dict()
        assert str(waiting) == str(saved[2])  # what was loaded and has not begun is kept
        train(again, optimizer, [batch(0, n) for n in range(stop, 9)])
    assert places(again) == places(whole)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("how", ["going on", "resuming"])
@pytest.mark.parametrize("at", range(1, 10))
def test_a_step_at_which_a_method_fails_is_a_step_like_all_others(at, how):
    """The other methods hear of it, the phases change when they would have, and nobody settles who did not fail.

    Where the training goes on in the same session, one that fails makes up for it by itself, unless its phase is over.
    """
    heard: list[Method] = []
    made_up: list[int] = []

    def phases(at=0):
        meeting = DiLoCo(Channel(path=Local.together(1)[0]), every=2)  # an extra meeting would change the weights
        return Phases(
            [set_(every=2, seed=1), Stumbles(heard, at)],
            [set_(every=3, seed=2), meeting, Stumbles(heard, at, made_up)],
            [Stumbles(heard, at), set_(every=2, seed=3)],
            until=[3, 6],
        )

    whole = run(phases(), 9, model=sparse())
    heard.clear()
    with ExitStack() as stack:
        model, method = sparse(), phases(at)
        optimizer = MOMENTUM(model.parameters())
        session = stack.enter_context(attach(model, optimizer, method))
        for n in range(9):
            try:
                train(model, optimizer, [batch(0, n)])
            except LostWorkerError:
                saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), session.state_dict()])
                if how == "resuming":
                    stack.close()
                    model, method = sparse(seed=5), phases()
                    optimizer = MOMENTUM(model.parameters())
                    session = stack.enter_context(attach(model, optimizer, method))
                    for piece, state in zip((model, optimizer, session), saved, strict=True):
                        piece.load_state_dict(state)
                    assert str(session.state_dict()) == str(saved[2])
        assert method.steps == session.steps == 9
    assert len(heard) == 9
    assert made_up == ([at] if at == 6 or (how == "resuming" and at in (4, 5)) else [])
    assert places(model) == places(whole)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_who_comes_after_one_that_failed_hears_of_the_step_before_the_next_forward_pass_and_before_the_phase_ends():
    log: list[str] = []
    a, b, c, d = (Noted(name, log) for name in "abcd")
    a.fails = c.fails = "after"
    model = network()
    optimizer = MOMENTUM(model.parameters())
    phases = Phases([a, b, c], [d], until=[2])
    with attach(model, optimizer, phases):

        def heard(what, match):
            log.clear()
            with pytest.raises(RuntimeError, match=match):
                what()
            return [line for line in log if "before" not in line]

        def step():
            train(model, optimizer, [batch(0, 0)])

        def forward():
            model(torch.zeros(1, 6))

        assert heard(step, "c failed") == ["a begin", "b begin", "c begin", "c after"]
        assert heard(forward, "a failed") == ["b after", "a after"]
        assert heard(step, "c failed") == ["c after"]
        assert phases.steps == 2
        assert heard(forward, "a failed") == ["c settle", "b after", "a after"]
        log.clear()
        forward()
        assert log == ["a settle", "c end", "b end", "a end", "d begin"]


def test_a_phase_does_not_end_before_what_failed_in_its_last_step_is_done():
    log: list[str] = []
    a, b, c = (Noted(name, log) for name in "abc")
    model = network()
    optimizer = MOMENTUM(model.parameters())
    a.fails = "after"
    with attach(model, optimizer, Phases([a, b], [c], until=[1])) as session:
        with pytest.raises(RuntimeError, match="a failed"):
            train(model, optimizer, [batch(0, 0)])
        a.fails = "settle"
        log.clear()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="a failed"):
                train(model, optimizer, [batch(0, 1)])
        a.fails = ""
        session.settle()
        assert log == ["a settle", "a settle", "a settle", "b end", "a end", "c begin", "c settle"]


def test_what_could_not_be_made_up_for_before_the_last_step_is_when_a_resumed_session_settles():
    for at, done in ((4, [4]), (3, [3])):  # at the last step of all, and of the first phase
        heard: list[Method] = []
        made_up: list[int] = []
        model = network()
        optimizer = MOMENTUM(model.parameters())
        with attach(model, optimizer, Phases([Stumbles(heard, at)], [Stumbles(heard, at)], until=[3])) as session:
            with pytest.raises(LostWorkerError):
                train(model, optimizer, [batch(0, n) for n in range(at)])
            saved = copy.deepcopy(session.state_dict())
        again = Phases([Stumbles(heard, 0, made_up)], [Stumbles(heard, 0, made_up)], until=[3])
        with attach(model, optimizer, again) as session:
            session.settle()
            assert made_up == []  # no step is done that anything could be left of
            session.load_state_dict(saved)
            session.settle()
            assert made_up[:1] == done
            assert again.state_dict()["failed"] == []


def test_a_state_that_could_not_be_taken_back_waits_for_the_next_forward_pass():
    class Away(Noted):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            self._note("load")

    log: list[str] = []
    method = Away("a", log, fails="load")
    phases = Phases([method], until=[])
    model = network()
    with attach(model, MOMENTUM(model.parameters()), phases):
        phases.load_state_dict({"steps": 4, "methods": [{"name": "Away", "state": {"steps": 4}}]})
        before = str(phases.state_dict())
        with pytest.raises(RuntimeError, match="a failed"):
            model(torch.zeros(1, 6))
        assert str(phases.state_dict()) == before
        method.fails, method.steps = "", 0
        model(torch.zeros(1, 6))
        assert method.steps == 4
        assert str(phases.state_dict()) == before


def test_a_later_phase_is_resumed_without_what_the_earlier_ones_need():
    with serve(MOMENTUM) as server:
        ticket = server.ticket(0)
    phases = Phases([PushPull(ticket, timeout_seconds=0.3)], [set_(every=3)], until=[2])
    model = sparse()
    before = copy.deepcopy(model.state_dict())
    with attach(model, MOMENTUM(model.parameters()), phases) as session:
        state = {"steps": 4, "methods": [{"name": "Rewire", "state": {"steps": 2, "moved": {}}}]}
        session.load_state_dict({"steps": 4, "methods": [{"name": "Phases", "state": state}]})
        model(torch.zeros(1, 6))
        assert phases.phase == 1
        assert torch.equal(model.state_dict()["0.values"], before["0.values"])
    phases = Phases([PushPull(ticket, timeout_seconds=0.3)], [], until=[2])
    model = network()
    with pytest.raises(ExchangeError, match="not answered a join"), attach(model, MOMENTUM(model.parameters()), phases):
        model(torch.zeros(1, 6))


def test_what_cannot_be_is_refused():
    for several, until in (([[]], [1]), ([[], []], []), ([[], []], [0]), ([[], [], []], [3, 3])):
        with pytest.raises(ValueError, match=r"phases need|increase"):
            Phases(*several, until=until)
    again = Noted("a", [])
    with pytest.raises(ValueError, match="the same method twice"):
        Phases([again], [], [again], until=[1, 2])
    model = network()
    phases = Phases([Noted("a", [])], [Noted("b", [])], until=[2])
    with attach(model, MOMENTUM(model.parameters()), phases):
        for state in ({"steps": 0, "methods": [{"name": "Rewire", "state": {}}]}, {"steps": 3, "methods": []}):
            with pytest.raises(ValueError, match="belongs to the methods"):
                phases.load_state_dict(state)
        assert phases.steps == 0
        model(torch.zeros(1, 6))
        state = {"steps": 3, "methods": [{"name": "Noted", "state": {"steps": 1}}]}
        with pytest.raises(ValueError, match="phase 0 has begun, and this state is of phase 1: load it before"):
            phases.load_state_dict(state)
        phases.load_state_dict({**state, "steps": 1})
        assert phases.phases[0][0].state_dict() == {"steps": 1}
