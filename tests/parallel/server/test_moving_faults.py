"""What a moving server refuses, and what it does when its process ends: nothing moved is lost."""

import threading
import time
from contextlib import contextmanager
from functools import partial

import moving_jobs
import pytest
import torch
from moving_jobs import MoveAt, move, places, same, sparse
from push_pull_jobs import MOMENTUM, PLAIN, batch, together, train

from noctule import set_
from noctule.core.errors import ExchangeError
from noctule.core.method import attach
from noctule.core.remap import exchange
from noctule.parallel import PushPull, Ticket
from noctule.parallel.server.listen import serve
from noctule.parallel.server.mirror import LayerMirror
from noctule.testing.processes import Workers


def test_only_worker_0_moves_connections():
    with serve(PLAIN) as server:
        begin = sparse()
        with attach(begin, torch.optim.SGD(begin.parameters(), lr=0.1), PushPull(server.ticket(0))):
            pass
        model = sparse()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with (
            pytest.raises(ValueError, match=r"of 0.values, 2.values have moved at worker 1, and only worker 0 moves"),
            attach(model, optimizer, set_(every=2, seed=1), PushPull(server.ticket(1))),
        ):
            train(model, optimizer, [batch(0, n) for n in range(4)])
        assert server.versions == [2]
        assert all(log.version == 0 for log in server.shards[0].logs.values())


def test_a_layer_that_changes_its_number_of_weights_is_refused_before_it_does():
    with serve(PLAIN) as server:
        model = sparse()
        with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), PushPull(server.ticket(0))):
            old = model[0].topology
            new, remap = exchange(old, torch.tensor([0, 1]), old.missing(1))
            with pytest.raises(ValueError, match=r"'0.values' is to go from .* weights.*keeps as many"):
                model[0].remap_(new, remap)
            assert model[0].topology is old
        model[0].remap_(new, remap)  # no hook is left


def test_the_server_keeps_what_it_needs_for_a_worker_that_is_far_behind():
    with serve(PLAIN, workers=1) as server:
        mover, model = sparse(), sparse()
        first, method = PushPull(server.ticket(0)), PushPull(server.ticket(1))
        slow = torch.optim.SGD(model.parameters(), lr=0.0)
        with (
            attach(mover, torch.optim.SGD(mover.parameters(), lr=0.0), first),
            attach(model, slow, method),
        ):
            for n in range(9):
                move(mover[0], seed=n)
                first.now()
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            before = {name: p.detach().clone() for name, p in server.shards[0].parameters.items()}
            slow.step()
            assert server.outdated == 1  # of the layer that moved too often, and of no other
            assert same(model, mover) is False
            first.now()
            assert same(model, mover)
            assert torch.equal(model[0].values, before["0.values"])
            assert torch.equal(model[2].values, before["2.values"] - 1)


@pytest.mark.parametrize(
    ("entry", "frames", "match"),
    [
        (["x", 1, 1], [], "cannot be"),
        ([["0.values"], 1, 1], [], "cannot be"),
        (["0.values", "1", 1], [], "cannot be"),
        ("nonsense", [], "cannot be"),
        (["0.values", 1, 1], [b""], "only a part came"),
        (["0.values", 1, None], [], "only a part came"),
        (["0.values", 1, None], [b"123"], "torn"),
        (["0.values", 1, None], [b"\0" * 4], "has 24 connections, and the server says 1"),
        (["0.values", 1, 1], [b"\0" * 4, b""], "1 connections are dropped and 0 grown"),
        (["0.values", 1, 1], [b"", b"", b""], "1 frames too many"),
    ],
)
def test_an_invalid_reply_about_connections_is_refused(entry, frames, match):
    model = sparse()
    mirror = LayerMirror(model, lambda name, remap: None)
    before = places(model)
    with pytest.raises(ExchangeError, match=match):
        mirror.follow({"places": [entry]}, frames)
    assert places(model) == before


@pytest.mark.parametrize("kills", [[5], pytest.param([5, 9, 14, 21], marks=pytest.mark.slow)])
def test_a_server_that_is_killed_restarts_with_all_moves(tmp_path, kills):
    steps = 8 + kills[-1]
    plain = sparse()
    own = MOMENTUM(plain.parameters())
    with attach(plain, own, set_(every=2, seed=1)):
        train(plain, own, [batch(0, n) for n in range(steps)])
    model = sparse()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with a_server_that_is_killed(tmp_path, 1) as restart:

        def after():
            done.append(None)
            if len(done) in kills:
                restart()

        done = []
        method = PushPull(Ticket.load(tmp_path / "worker-0.json"), bound=0)
        with attach(model, optimizer, set_(every=2, seed=1), method):
            train(model, optimizer, [batch(0, n) for n in range(steps)], after)
    assert same(model, plain)
    with serve(MOMENTUM, shards=2, folder=tmp_path) as server:
        assert server.versions == [steps] * 2
        for name, p in model.named_parameters():
            assert torch.equal(p, next(s.parameters[name] for s in server.shards if name in s.parameters))


class Ones:
    """A worker that pushes a gradient of ones at each step, from weights that are whole numbers: no sum is rounded."""

    def __init__(self, rank, folder, steps):
        self.model, self.rank, self.steps, self.done = sparse(seed=rank), rank, steps, 0
        for p in self.model.parameters():
            p.detach().mul_(8).round_()
        self.push_pull = PushPull(Ticket.load(folder / f"worker-{rank}.json"), bound=3)

    def train(self, all_done):
        """Train, and pull when all workers have pushed everything."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        moves = [MoveAt(self.model[0], range(2, self.steps, 5))] if self.rank == 0 else []
        with attach(self.model, optimizer, *moves, self.push_pull):
            self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            self.first = self.model[0].topology
            for _ in range(self.steps):
                for p in self.model.parameters():
                    p.grad = torch.ones_like(p)
                optimizer.step()
                self.done += 1
                time.sleep(0.01)
            all_done.wait()
            self.push_pull.now()


def kill_at(steps, workers, restart, all_done):
    """Kill and restart the server when all workers have made so many steps."""
    for step in steps:
        while min(worker.done for worker in workers) < step:
            time.sleep(0.002)
        restart()
    all_done.wait()


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_no_push_of_any_worker_is_lost_or_counted_twice_when_the_server_is_killed_between_moves(tmp_path, count):
    steps, all_done = 24, threading.Barrier(count + 1, timeout=240)
    with a_server_that_is_killed(tmp_path, count, job=moving_jobs.run_plain_server) as restart:
        workers = [Ones(rank, tmp_path, steps) for rank in range(count)]
        trainings = [partial(worker.train, all_done) for worker in workers]
        together([*trainings, partial(kill_at, [4, 9, 15], workers, restart, all_done)])
    worker, pushes = workers[0], steps * count
    model, start = worker.model, worker.start
    assert all(same(other.model, model) for other in workers[1:])
    assert torch.equal(model[2].values, start["2.values"] - pushes)
    assert torch.equal(model[0].bias, start["0.bias"] - pushes)
    before = dict(zip(worker.first.keys().tolist(), start["0.values"].tolist(), strict=True))
    after = dict(zip(model[0].topology.keys().tolist(), model[0].values.tolist(), strict=True))
    lost = [after[key] - (before[key] - pushes) for key in after.keys() & before.keys()]
    assert min(lost) == 0  # positive for a connection that was dropped and grown again
    assert lost.count(0) > 5


@contextmanager
def a_server_that_is_killed(folder, workers, job=moving_jobs.run_server):
    """Run a server in a process; gives a function that kills and restarts it."""
    with Workers(1, group=False) as processes:

        def begin():
            processes.begin(job, str(folder), 2, workers)

        def restart():
            processes.kill(0)
            processes.start(0)
            begin()

        begin()
        deadline = time.monotonic() + 20
        while not (folder / f"worker-{workers - 1}.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield restart
        processes.kill(0)
