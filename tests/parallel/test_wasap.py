"""WASAP-SGD: its phases over real sockets, what is carried from one to the next, and a small real task."""

import copy
import os
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import wasap_jobs
from moving_jobs import alike, places, sparse, state_of
from push_pull_jobs import ADAGRAD, MOMENTUM, batch, train

from exchange_cases import together
from noctule import set_
from noctule.checkpoint import Checkpoints
from noctule.core.errors import ExchangeError, LostWorkerError
from noctule.core.exchange import Channel
from noctule.core.method import Method, attach
from noctule.core.phases import Phases
from noctule.data import Batches, Dataset
from noctule.exchange import Local
from noctule.parallel import PushPull
from noctule.parallel.merging import Merge
from noctule.parallel.server.listen import serve
from noctule.parallel.wasap import MOMENTUM as BUFFER
from noctule.parallel.wasap import HandOver, wasap
from noctule.sparse.rewire import Rewire
from noctule.testing.processes import Workers
from noctule.train.fit import fit

STEPS = 10


def phases(server, path, *, steps=STEPS, bound=0, **options):
    return wasap(
        PushPull(server.ticket(path.rank), bound=bound),
        Channel(path=path),
        steps=steps,
        rewire=partial(set_, every=2),
        **options,
    )


def work(server, path, *, optimizer=MOMENTUM, steps=STEPS, pace=int, **options):
    model = sparse(seed=path.rank)
    own = optimizer(model.parameters())
    moved = []

    def after():
        moved.append(places(model))
        pace()

    with attach(model, own, phases(server, path, steps=steps, **options)):
        train(model, own, [batch(path.rank, n) for n in range(steps)], after)
    return model, own, moved


@pytest.mark.parametrize("bound", [0, None])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_have_one_network_at_the_end_and_moved_connections_together_and_then_apart(world, bound):
    step = threading.Barrier(world, timeout=60)  # or one whom nobody waits for might hear of all moves at once
    with serve(MOMENTUM, shards=2, workers=world) as server:
        found = together(world, lambda path: work(server, path, bound=bound, pace=step.wait))
        assert server.versions == [7 * world] * 2
    assert alike([state_of(model, own) for model, own, _ in found])
    together_at, apart_at = 4, STEPS - 2
    if bound == 0:
        assert all(moved[together_at] == found[0][2][together_at] for *_, moved in found)
    if world > 1:
        assert found[0][2][apart_at] != found[1][2][apart_at]
    for model, _, moved in found:
        assert [m.size for m in moved[-1]] == [24, 12]
        assert len({m[0] for m in moved}) >= 4
        assert model[0].weights == 24


def test_one_worker_is_plain_training_with_as_many_phases():
    """The server's momentum and connections go over to the worker's own optimizer bit for bit."""
    plain = sparse()
    own = MOMENTUM(plain.parameters())
    with attach(plain, own, set_(every=2, seed=0)):
        train(plain, own, [batch(0, n) for n in range(7)])
    with attach(plain, own, set_(every=2, seed=1)):
        train(plain, own, [batch(0, n) for n in range(7, 10)])
    with serve(MOMENTUM) as server:
        model, mine, _ = work(server, Local.together(1)[0])
    assert places(model) == places(plain)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(mine.state[p][BUFFER], own.state[q][BUFFER])


@pytest.mark.parametrize(("theirs", "ours"), [(ADAGRAD, MOMENTUM), (MOMENTUM, ADAGRAD)])
def test_other_optimizers_keep_their_own_state(theirs, ours):
    with serve(theirs) as server:
        model = sparse()
        own = ours(model.parameters())
        push_pull = PushPull(server.ticket(0))
        with attach(model, own, HandOver(push_pull, at=3), push_pull):
            train(model, own, [batch(0, n) for n in range(2)])
            before = copy.deepcopy([own.state[p] for p in model.parameters()])
            assert all(before)
            train(model, own, [batch(0, 2)])
            for p, state in zip(model.parameters(), before, strict=True):
                assert own.state[p].keys() == state.keys()


def test_the_momentum_of_pushed_sums_is_that_of_one_gradient():
    with serve(MOMENTUM) as server:
        model = sparse()
        own = MOMENTUM(model.parameters())
        push_pull = PushPull(server.ticket(0), push_every=2, pull_every=2)
        with attach(model, own, HandOver(push_pull, at=4), push_pull):
            for _ in range(4):
                for p in model.parameters():
                    p.grad = torch.ones_like(p)
                own.step()
            for p in model.parameters():
                assert own.state[p][BUFFER].unique().tolist() == pytest.approx([1.9])  # 1 + 0.9, of two pushes


@pytest.mark.parametrize("stop", [3, 6, 7, 8])
def test_resuming_is_never_having_stopped(stop):
    def job(path, server, resume):
        model = sparse(seed=path.rank)
        own = MOMENTUM(model.parameters())
        with attach(model, own, phases(server, path)) as session:
            train(model, own, [batch(path.rank, n) for n in range(stop if resume else STEPS)])
            saved = copy.deepcopy([model.state_dict(), own.state_dict(), session.state_dict()])
        return (model, own, []) if not resume else saved

    def go_on(path, server, saved):
        model = sparse(seed=7)
        own = MOMENTUM(model.parameters())
        with attach(model, own, phases(server, path)) as session:
            model.load_state_dict(saved[path.rank][0])
            own.load_state_dict(saved[path.rank][1])
            session.load_state_dict(saved[path.rank][2])
            train(model, own, [batch(path.rank, n) for n in range(stop, STEPS)])
        return model, own, []

    with serve(MOMENTUM, workers=1) as server:
        whole = together(1, partial(job, server=server, resume=False))
    with serve(MOMENTUM, workers=1) as server:
        saved = together(1, partial(job, server=server, resume=True))
        found = together(1, partial(go_on, server=server, saved=saved))
    assert alike([state_of(model, own) for model, own, _ in (*whole, *found)])


@dataclass
class Journal:
    """Keeps checkpoints only."""

    checkpoints: Checkpoints

    def log(self, record):
        pass

    def rewind(self, epoch):
        pass


def lose():
    raise LostWorkerError("a worker was lost")


class After(Method):
    """Does something after a step, once."""

    def __init__(self, step, act):
        self.left, self.act = step, act

    def after_step(self):
        self.left -= 1
        if not self.left:
            self.act()


@pytest.mark.parametrize(("how", "pushed"), [("going on", True), ("going on", False), ("resuming", True)])
def test_a_server_that_is_away_at_the_hand_over_is_asked_again_before_the_second_phase(tmp_path, how, pushed):
    def job(folder, act):
        server = serve(MOMENTUM, folder=folder)

        def pieces():
            push_pull = PushPull(server.ticket(0), timeout_seconds=2)
            away = After(3, partial(act, server))
            together = [HandOver(push_pull, at=3), *([away, push_pull] if pushed else [push_pull, away])]
            model = sparse(seed=3)
            own = MOMENTUM(model.parameters())
            return model, own, Phases(together, [set_(every=2, seed=1)], until=[3])

        with ExitStack() as stack:
            model, own, method = pieces()
            session = stack.enter_context(attach(model, own, method))
            for n in range(6):
                try:
                    train(model, own, [batch(0, n)])
                except ExchangeError:
                    failed.append(n)
                    saved = copy.deepcopy([model.state_dict(), own.state_dict(), session.state_dict()])
                    server = stack.enter_context(serve(MOMENTUM, folder=folder))
                    if how == "resuming":
                        session.close()
                        model, own, method = pieces()
                        session = stack.enter_context(attach(model, own, method))
                        for piece, state in zip((model, own, session), saved, strict=True):
                            piece.load_state_dict(state)
            assert method.steps == 6
        server.close()
        return state_of(model, own)

    failed: list[int] = []
    whole = job(tmp_path / "whole", lambda server: None)
    assert not failed
    assert alike([whole, job(tmp_path / "broken", lambda server: server.close())])
    assert failed == [2]


def test_a_merge_that_a_worker_missed_happens_when_the_training_is_resumed(tmp_path):
    """The real loop and its checkpoints: one worker has done its last step, the other is started again."""
    draws = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(24, 6, generator=draws), torch.randint(3, (24,), generator=draws)
    dataset = Dataset(inputs, targets, name="some", classes=3)

    def job(path, folder, fails=0):
        model = sparse()
        own = MOMENTUM(model.parameters())
        alone = [Merge(Channel(path=path), every=6), set_(every=2, seed=path.rank)]
        method = Phases([After(fails, lose)], alone, until=[6])
        fitted = fit(
            model,
            own,
            Batches(dataset, 4, seed=path.rank),
            validation=dataset,
            epochs=2,
            methods=[method],
            journal=Journal(Checkpoints(folder / str(path.rank))),
        )
        assert method.steps == fitted.step == 12
        return state_of(model, own)

    whole = together(2, partial(job, folder=tmp_path / "whole"))
    assert alike(whole)
    for fails in (4, 6):  # in the first phase, and at its last step
        folder = tmp_path / f"broken-{fails}"
        nobody = Local.together(2, timeout_seconds=0.2)
        with pytest.raises(LostWorkerError):
            job(nobody[0], folder, fails)
        with pytest.raises(ExchangeError, match="did not come"):
            job(nobody[0], folder)
        for ours, theirs in zip(together(2, partial(job, folder=folder)), whole, strict=True):
            assert alike([ours, theirs])


def test_the_parts_of_each_worker():
    with serve(MOMENTUM) as server:
        first, second = (
            wasap(PushPull(server.ticket(rank)), Channel(path=path), steps=1000, seed=5)
            for rank, path in enumerate(Local.together(2))
        )
    assert first.until == second.until == (700,)

    def kinds(methods: tuple[Method, ...]) -> list[type]:
        return [type(method) for method in methods]

    assert kinds(first.phases[0]) == [HandOver, Rewire, PushPull]
    assert kinds(second.phases[0]) == [HandOver, PushPull]
    assert kinds(first.phases[1]) == kinds(second.phases[1]) == [Merge, Rewire]
    seeds = {
        method.seed
        for part in (first, second)
        for phase in part.phases
        for method in phase
        if isinstance(method, Rewire)
    }
    assert len(seeds) == 3
    for share in (0.0, 1.0):
        with serve(MOMENTUM) as server, pytest.raises(ValueError, match="both phases must have steps"):
            wasap(PushPull(server.ticket(0)), Channel(path=Local.together(1)[0]), steps=10, share=share)


def test_processes_end_with_one_network_too(tmp_path):
    with serve(MOMENTUM, workers=2, shards=2) as server, Workers(2) as processes:
        for rank in range(2):
            server.ticket(rank).save(tmp_path / f"worker-{rank}.json")
        (numbers, keys), (others, other_keys) = processes.call(wasap_jobs.small, str(tmp_path), 12)
    assert numbers.keys() == others.keys()
    assert all(torch.equal(x, others[name]) for name, x in numbers.items())
    assert all(torch.equal(a, b) for a, b in zip(keys, other_keys, strict=True))


@pytest.mark.slow
@pytest.mark.skipif("NOCTULE_DATA" not in os.environ, reason="needs the data in NOCTULE_DATA")
def test_two_workers_learn_fashion_mnist_about_as_well_as_one(tmp_path):
    with Workers(1) as processes:
        (alone,) = processes.call(wasap_jobs.train, "", 3, None, 0, timeout_seconds=300)
    with serve(wasap_jobs.SGD, workers=2) as server, Workers(2) as processes:
        for rank in range(2):
            server.ticket(rank).save(tmp_path / f"worker-{rank}.json")
        found = processes.call(wasap_jobs.train, str(tmp_path), 3, None, 0, 8, timeout_seconds=300)
    assert found[0]["accuracy"] == found[1]["accuracy"]  # one network
    assert found[0]["loss"] == found[1]["loss"]
    assert alone["accuracy"] > 0.83
    assert found[0]["accuracy"] > alone["accuracy"] - 0.015
