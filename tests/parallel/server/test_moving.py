"""Connections that move while workers train on one set of weights: worker 0 moves them, the server and the others follow."""

import copy
import threading
from functools import partial

import pytest
import torch
from moving_jobs import move, places, same, sparse
from push_pull_jobs import ADAGRAD, ADAM, MOMENTUM, PLAIN, batch, together, train

from exchange_cases import Half
from noctule import gse, rigl, set_
from noctule.core.method import Method, attach
from noctule.parallel import PushPull
from noctule.parallel.server.listen import serve


@pytest.mark.parametrize(
    ("make", "optimizer", "bound", "shards"),
    [
        (set_, MOMENTUM, 0, 1),
        (set_, ADAM, None, 3),
        (partial(rigl, until=9), ADAM, 0, 2),
        (gse, MOMENTUM, None, 3),
        (gse, ADAGRAD, 0, 1),
    ],
)
def test_one_worker_that_moves_connections_is_plain_training_bit_for_bit(make, optimizer, bound, shards):
    plain = sparse()
    own = optimizer(plain.parameters())
    before = places(plain)
    with attach(plain, own, make(every=3, seed=1)):
        train(plain, own, [batch(0, n) for n in range(10)])
    assert places(plain) != before
    model = sparse()
    mine = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with serve(optimizer, shards=shards) as server:
        with attach(model, mine, make(every=3, seed=1), PushPull(server.ticket(0), bound=bound)):
            train(model, mine, [batch(0, n) for n in range(10)])
        assert server.versions == [10] * shards
        assert same(model, plain)
        theirs = {name: x for shard in server.shards for name, x in shard.weights.kept("momentum_buffer").items()}
        for name, x in theirs.items():
            assert torch.equal(x, own.state[dict(plain.named_parameters())[name]]["momentum_buffer"])
        assert bool(theirs) == (optimizer is MOMENTUM)


@pytest.mark.parametrize("moves_every", [3, 4])
def test_with_overlap_one_worker_that_moves_connections_is_plain_training(moves_every):
    plain = sparse()
    own = PLAIN(plain.parameters())
    with attach(plain, own, set_(every=moves_every, seed=1)):
        train(plain, own, [batch(0, n) for n in range(16)])
    model = sparse()
    mine = PLAIN(model.parameters())
    with serve(PLAIN, shards=2) as server:
        push_pull = PushPull(server.ticket(0), push_every=2, pull_every=2, overlap=True)
        with attach(model, mine, set_(every=moves_every, seed=1), push_pull) as session:
            train(model, mine, [batch(0, n) for n in range(16)])
            session.settle()
    assert places(model) == places(plain)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("pull_every", "overlap"), [(1, False), (4, False), (2, True)])
def test_the_server_and_all_workers_have_the_movers_connections(order, pull_every, overlap):
    with serve(MOMENTUM, shards=2, workers=3) as server:

        def job(rank):
            model = sparse(seed=rank)  # other weights and other connections: worker 0's count
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            push_pull = PushPull(server.ticket(rank), push_every=2, pull_every=pull_every, overlap=overlap)
            methods: list[Method] = [push_pull]
            if rank == 0:
                methods.insert(0 if order == "before" else 1, set_(every=3, seed=2))
            with attach(model, optimizer, *methods) as session:
                train(model, optimizer, [batch(rank, n) for n in range(12)])
                session.state_dict()  # what moved after the last step is reported now, or before the next one
                push_pull.now()
                barrier.wait()
                push_pull.fetch("")
            return model

        barrier = threading.Barrier(3, timeout=30)
        models = together([lambda r=r: job(r) for r in range(3)])
        for name, layer in (("0.values", models[0][0]), ("2.values", models[0][2])):
            (log,) = (shard.logs[name] for shard in server.shards if name in shard.logs)
            assert log.version == 4
            assert log.topology == layer.topology
    assert same(models[1], models[0])
    assert same(models[2], models[0])


def test_a_worker_that_comes_later_or_again_gets_todays_connections():
    with serve(MOMENTUM) as server:
        first = sparse()
        optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
        with attach(first, optimizer, set_(every=1, seed=1), PushPull(server.ticket(0))) as session:
            train(first, optimizer, [batch(0, n) for n in range(3)])
            session.methods[1].now()
            joins(server, 1, first)
        joins(server, 0, first)


def joins(server, rank, first):
    other = sparse(seed=4)
    with attach(other, torch.optim.SGD(other.parameters(), lr=0.1), PushPull(server.ticket(rank))):
        pass
    assert same(other, first)


@pytest.mark.parametrize("codec", [None, Half()], ids=["exact", "half"])
@pytest.mark.parametrize("early", [False, True], ids=["model loaded in the session", "model loaded before"])
def test_a_mover_that_dies_after_it_has_saved_continues_as_if_it_had_not(codec, early):
    """It dies where it has just pulled, and then moved connections: what its own optimizer did since a pull would be gone."""

    def opened(server, model):
        optimizer = ADAM(model.parameters())
        return optimizer, (set_(every=4, seed=3), PushPull(server.ticket(0), push_every=2, pull_every=4, codec=codec))

    with serve(MOMENTUM, codec=codec) as server:
        whole = sparse()
        optimizer, methods = opened(server, whole)
        with attach(whole, optimizer, *methods):
            train(whole, optimizer, [batch(0, n) for n in range(12)])
    with serve(MOMENTUM, codec=codec) as server:
        model = sparse()
        optimizer, methods = opened(server, model)
        with attach(model, optimizer, *methods) as session:
            train(model, optimizer, [batch(0, n) for n in range(4)])
            saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), session.state_dict()])
            methods[1].clients.wait()  # it has arrived
            methods[1].clients.failed = True  # and nothing more will
        again = sparse(seed=9)
        optimizer, methods = opened(server, again)
        if early:
            again.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        with attach(again, optimizer, *methods) as session:
            if not early:
                again.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            session.load_state_dict(saved[2])
            train(again, optimizer, [batch(0, n) for n in range(4, 12)])
    assert same(again, whole)


def test_what_is_accrued_for_older_connections_finds_its_slots_when_it_is_loaded():
    with serve(PLAIN) as server:
        model = sparse()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        method = PushPull(server.ticket(0), push_every=100)
        with attach(model, optimizer, method) as session:
            model[0].values.grad = torch.arange(1.0, model[0].weights + 1)
            optimizer.step()
            saved, old = copy.deepcopy(session.state_dict()), model[0].topology
            move(model[0], count=4)
            session.load_state_dict(
                saved
            )  # of the connections before the move: it goes back, and today's are those again
            assert model[0].topology == old
            move(model[0], count=4)
            method.now()
            new = model[0].topology
        model = sparse(seed=3)
        with attach(model, torch.optim.SGD(model.parameters(), lr=0.0), method) as session:
            session.load_state_dict(saved)
            assert model[0].topology == new
            expected = dict(zip(old.keys().tolist(), range(1, old.size + 1), strict=True))
            assert method.accrued["0.values"].tolist() == [expected.get(key, 0) for key in new.keys().tolist()]


@pytest.mark.parametrize("what", ["accrued", "owed"])
def test_what_a_worker_keeps_follows_the_server(what):
    codec = Half() if what == "owed" else None
    with serve(PLAIN, codec=codec) as server:
        mover, model = sparse(), sparse()
        method = PushPull(server.ticket(1), push_every=1 if codec else 100, codec=codec)
        first = PushPull(server.ticket(0), codec=codec)
        with attach(mover, torch.optim.SGD(mover.parameters(), lr=0.0), first):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            with attach(model, optimizer, method):
                old = model[0].topology
                model[0].values.grad = torch.arange(1.0, old.size + 1)
                optimizer.step()
                kept = dict(method.compress.owed if codec else method.accrued)["0.values"]
                values = dict(zip(old.keys().tolist(), kept.tolist(), strict=True))
                move(mover[0], count=5)
                first.now()
                method._pull()
                assert model[0].topology == mover[0].topology != old
                now = (method.compress.owed if codec else method.accrued)["0.values"].tolist()
                assert now == [values.get(key, 0.0) for key in model[0].topology.keys().tolist()]


def test_first_values_are_those_at_the_time_of_the_move():
    with serve(PLAIN) as server:
        model = sparse()
        method = PushPull(server.ticket(0), push_every=10, pull_every=10)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with attach(model, optimizer, method):
            old = model[0].topology
            move(model[0], first=0.25)
            grown = ~torch.isin(model[0].topology.keys(), old.keys())
            for _ in range(2):  # its own steps must not count twice
                model[0].values.grad = torch.ones(old.size)
                optimizer.step()
            method.clients.wait()
            assert server.shards[0].parameters["0.values"][grown].tolist() == [0.25] * 3
            method.now()
            assert model[0].values[grown].tolist() == [0.25 - 2.0] * 3
