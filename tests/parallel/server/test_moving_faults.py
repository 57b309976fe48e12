"""What a moving server refuses, and what it does when its process ends: nothing moved is lost."""

import threading
import time
from contextlib import contextmanager

import moving_jobs
import pytest
import torch
from moving_jobs import MoveAt, move, places, same, sparse
from push_pull_jobs import MOMENTUM, PLAIN, batch, together, train

from noctule import set_
from noctule.core.errors import ExchangeError
from noctule.core.method import Method, attach
from noctule.core.remap import exchange
from noctule.parallel import PushPull, Ticket
from noctule.parallel.server.follower import Followed
from noctule.parallel.server.listen import serve
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
        assert all(ledger.version == 0 for ledger in server.shards[0].ledgers.values())


def test_a_layer_that_changes_its_number_of_weights_is_refused_before_it_does():
    with serve(PLAIN) as server:
        model = sparse()
        with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), PushPull(server.ticket(0))):
            old = model[0].topology
            new, remap = exchange(old, torch.tensor([0, 1]), old.missing(1))
            with pytest.raises(ValueError, match=r"'0.values' is to go from .* weights.*keeps as many"):
                model[0].remap_(new, remap)
            assert model[0].topology is old
        model[0].remap_(new, remap)  # nobody listens any more


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
        (["0.values", 1, 1], [b"\0" * 4, b""], "1 connections go and 0 come"),
        (["0.values", 1, 1], [b"", b"", b""], "1 frames too many"),
    ],
)
def test_what_a_server_says_that_cannot_be_is_refused(entry, frames, match):
    model = sparse()
    followed = Followed(model, lambda name, remap: None)
    before = places(model)
    with pytest.raises(ExchangeError, match=match):
        followed.take({"places": [entry]}, frames)
    assert places(model) == before


@pytest.mark.parametrize("kills", [[5], pytest.param([5, 9, 14, 21], marks=pytest.mark.slow)])
def test_a_server_that_is_killed_comes_back_with_all_moves(tmp_path, kills):
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


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_no_push_of_any_worker_is_lost_or_counted_twice_when_the_server_is_killed_between_moves(tmp_path, workers):
    steps, kills = 24, [4, 9, 15]
    with a_server_that_is_killed(tmp_path, workers, job=moving_jobs.run_plain_server) as restart:
        done = [0] * workers
        finished = threading.Barrier(workers + 1, timeout=60)

        def job(rank):
            model = sparse(seed=rank)
            for p in model.parameters():
                p.detach().mul_(8).round_()  # whole numbers: no rounding
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            push_pull = PushPull(Ticket.load(tmp_path / f"worker-{rank}.json"), bound=3)
            methods: list[Method] = [MoveAt(model[0], range(2, steps, 5)), push_pull] if rank == 0 else [push_pull]
            with attach(model, optimizer, *methods):
                start = {name: p.detach().clone() for name, p in model.named_parameters()}, places(model)
                for _ in range(steps):
                    for p in model.parameters():
                        p.grad = torch.ones_like(p)
                    optimizer.step()
                    done[rank] += 1
                    time.sleep(0.01)
                finished.wait()
                push_pull.now()
            return start, model

        def kill():
            for after in kills:
                while min(done) < after:
                    time.sleep(0.002)
                restart()
            finished.wait()

        killer = threading.Thread(target=kill)
        killer.start()
        results = together([lambda r=r: job(r) for r in range(workers)])
        killer.join()
    (start, first), _ = results[0]
    model = results[0][1]
    assert all(same(other, model) for _, other in results[1:])
    assert torch.equal(model[2].values, start["2.values"] - steps * workers)  # each push, once
    assert torch.equal(model[0].bias, start["0.bias"] - steps * workers)
    stayed = torch.isin(model[0].topology.keys(), first[0].keys())
    was = dict(zip(first[0].keys().tolist(), start["0.values"].tolist(), strict=True))
    full = 0
    for key, value in zip(model[0].topology.keys()[stayed].tolist(), model[0].values[stayed].tolist(), strict=True):
        full += value == was[key] - steps * workers
        assert value >= was[key] - steps * workers  # more where it was dropped and grown again
    assert full > 5


@contextmanager
def a_server_that_is_killed(folder, workers, job=moving_jobs.run_server):
    """Gives what kills it and starts it again."""
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
