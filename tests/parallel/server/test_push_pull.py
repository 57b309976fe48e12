"""Workers and a parameter server over real sockets: the laws of bound 0, of bounds, of compression and of resuming."""

import copy
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch
from push_pull_jobs import ADAGRAD, ADAM, MOMENTUM, PLAIN, batch, network, together, train, work
from torch import nn

from exchange_cases import Half
from noctule.codecs import NaturalCompression
from noctule.core.errors import NonFiniteError
from noctule.core.method import attach
from noctule.parallel import PushPull
from noctule.parallel.server.listen import serve


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAGRAD, ADAM], ids=["momentum", "adagrad", "adam"])
@pytest.mark.parametrize(("bound", "shards"), [(0, 1), (None, 3)])
def test_one_worker_is_plain_training_bit_for_bit(optimizer, bound, shards):
    plain = network()
    expected = train(plain, optimizer(plain.parameters()), (batch(0, n) for n in range(8)))
    with serve(optimizer, shards=shards) as server:
        found = work(PushPull(server.ticket(0), bound=bound), (batch(0, n) for n in range(8)))
    assert server.versions == [8] * shards
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shards", [1, 2])
def test_bound_0_and_several_workers_are_one_worker_on_all_their_batches(shards):
    plain = network()
    union = [[torch.cat(parts) for parts in zip(*(batch(rank, n) for rank in range(3)))] for n in range(6)]
    expected = train(plain, MOMENTUM(plain.parameters()), union)
    with serve(MOMENTUM, shards=shards, workers=3) as server:
        methods = [PushPull(server.ticket(rank), bound=0) for rank in range(3)]
        results = together([lambda r=r, m=m: work(m, [batch(r, n) for n in range(6)]) for r, m in enumerate(methods)])
    for found in results:
        for a, b, c in zip(found, expected, results[0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
            assert torch.equal(a, c)
    assert server.staleness == {0: 18 * shards}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("sizes", [[1, 2, 5], [0, 8], [3, 0, 0, 1]], ids=str)
def test_parts_that_count_by_their_size_are_one_worker_on_their_union(sizes, every):
    def parts(n):
        """Of a batch, for each worker; who has none takes a sample of another's."""
        batches = [[x[:size] for x in batch(rank, n)] for rank, size in enumerate(sizes)]
        spare = [x[:1] for x in batch(9, n)]
        return [each if len(each[0]) else spare for each in batches], [torch.cat(x) for x in zip(*batches)]

    plain, steps = network(), 6
    own = MOMENTUM(plain.parameters())
    for n in range(0, steps, every):
        own.zero_grad()
        for m in range(n, n + every):  # a push is the sum of the gradients since the last
            x, y = parts(m)[1]
            (plain(x) - y).pow(2).mean().backward()
        own.step()
    with serve(MOMENTUM, workers=len(sizes)) as server:

        def job(rank):
            weight = sizes[rank] * len(sizes) / sum(sizes)
            method = PushPull(server.ticket(rank), bound=0, push_every=every, pull_every=every, weigh=lambda: weight)
            model = network(seed=rank)
            still = torch.optim.SGD(model.parameters(), lr=0.0)
            with attach(model, still, method):
                return train(model, still, [parts(n)[0][rank] for n in range(steps)])

        found = together([lambda r=r: job(r) for r in range(len(sizes))])
    for p, *ours in zip(plain.parameters(), *found, strict=True):
        for x in ours:
            torch.testing.assert_close(x, p.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_cannot_be_is_refused_and_nothing_is_sent(weight):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with serve(PLAIN) as server:
        method = PushPull(server.ticket(0), weigh=lambda: weight)
        with (
            attach(model, optimizer, method),
            pytest.raises(ValueError, match=f"at least 0 and finite, got {weight}"),
        ):
            train(model, optimizer, [batch(0, 0)])
        assert not method.accrued
        assert server.versions == [0]


@pytest.mark.parametrize("bound", [0, 2])
def test_the_bound_holds_for_workers_of_any_speed(bound):
    steps, ahead = 12, []
    with serve(ADAGRAD, workers=3) as server:
        states = server.shards[0].states

        def check(worker, done):
            time.sleep(0.003 * worker)
            done.append(None)
            ahead.append(len(done) - min(state.clock for state in list(states.values())))

        def job(worker):
            done: list[None] = []
            return work(
                PushPull(server.ticket(worker), bound=bound),
                [batch(worker, n) for n in range(steps)],
                lambda: check(worker, done),
            )

        together([lambda w=w: job(w) for w in range(3)])
    assert max(ahead) <= bound
    assert server.versions == [3 * steps]


def test_without_a_bound_the_fast_one_runs_ahead_and_the_slow_one_is_stale():
    with serve(ADAGRAD, workers=2) as server:
        fast, slow = PushPull(server.ticket(0)), PushPull(server.ticket(1))
        went = threading.Event()

        together(
            [
                lambda: (work(fast, [batch(0, n) for n in range(10)]), went.set()),
                lambda: work(slow, [batch(1, n) for n in range(2)], lambda: went.wait(20)),
            ]
        )
    assert sum(server.staleness.values()) == 12
    assert fast.staleness + slow.staleness == server.staleness
    assert max(slow.staleness) >= 5


@pytest.mark.parametrize("codec", [Half(), NaturalCompression()], ids=["half", "natural"])
def test_what_arrived_and_what_is_owed_is_what_was_given(codec):
    model = nn.Linear(5, 4)
    start, given = [p.detach().clone() for p in model.parameters()], [torch.zeros(4, 5), torch.zeros(4)]
    generator = torch.Generator().manual_seed(1)
    with serve(PLAIN, shards=2, codec=codec) as server:
        method = PushPull(server.ticket(0), codec=codec, push_every=2, pull_every=3)
        method.compress.error_feedback = True
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with attach(model, optimizer, method):
            for _ in range(9):
                for p, total in zip(model.parameters(), given, strict=True):
                    p.grad = torch.randn(p.shape, generator=generator)
                    total += p.grad
                optimizer.step()
            method.now()
    assert not method.accrued
    for name, p, before, total in zip(["weight", "bias"], model.parameters(), start, given, strict=True):
        torch.testing.assert_close(before - p + method.compress.owed[name], total, atol=1e-5, rtol=1e-5)


def test_between_pulls_a_worker_continues_by_itself():
    plain = network()
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), [batch(0, n) for n in range(2)])
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with serve(MOMENTUM) as server, attach(model, optimizer, PushPull(server.ticket(0), push_every=3, pull_every=3)):
        found = train(model, optimizer, [batch(0, n) for n in range(2)])
        assert server.versions == [0]
        train(model, optimizer, [batch(0, 2)])
        assert server.versions == [1]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for p, (name, q) in zip(model.parameters(), network().named_parameters(), strict=True):
        assert torch.equal(p, server.shards[0].parameters[name])
        assert not torch.equal(p, q)


def test_the_others_begin_when_the_first_is_warm():
    versions = []
    with serve(ADAGRAD, workers=2) as server:

        def second():
            method = PushPull(server.ticket(1), warm_start=4)
            work(method, (batch(1, n) for n in range(2)), lambda: versions.append(server.versions[0]))

        first = PushPull(server.ticket(0), warm_start=4)
        together([second, lambda: work(first, slowly(6))])
    assert min(versions) >= 5
    assert server.versions == [8]


def slowly(count):
    for n in range(count):
        time.sleep(0.02)
        yield batch(0, n)


@pytest.mark.parametrize("codec", [None, Half(), NaturalCompression()], ids=["exact", "half", "natural"])
def test_resuming_is_never_having_stopped(codec):
    def opened(server, model):
        optimizer = ADAM(model.parameters())
        method = PushPull(server.ticket(0), push_every=2, pull_every=4, codec=codec)
        return optimizer, attach(model, optimizer, method)

    with serve(MOMENTUM, codec=codec) as server:
        whole = network()
        optimizer, session = opened(server, whole)
        with session:
            expected = train(whole, optimizer, [batch(0, n) for n in range(12)])
    with serve(MOMENTUM, codec=codec) as server:
        first = network()
        optimizer, session = opened(server, first)
        with session:
            train(first, optimizer, [batch(0, n) for n in range(4)])
            # it stops where it has just pulled: what its own optimizer did since would be gone
            saved = copy.deepcopy([first.state_dict(), optimizer.state_dict(), session.state_dict()])
        second = network(seed=5)
        optimizer, session = opened(server, second)
        optimizer.load_state_dict(saved[1])
        with session:
            session.load_state_dict(saved[2])
            found = train(second, optimizer, [batch(0, n) for n in range(4, 12)])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_each_seed_worker_and_step_draws_its_own_numbers():
    drawn, encode = [], Half.encode

    def recorded(self, x, generator=None):
        drawn.append(generator.initial_seed())
        return encode(self, x, generator)

    with serve(PLAIN, codec=Half()) as server, mock.patch.object(Half, "encode", recorded):
        for seed, worker in ((0, 0), (1, 0), (0, 1), (0, 0)):
            work(PushPull(server.ticket(worker), codec=Half(), seed=seed), [batch(0, n) for n in range(2)])
    first, other_seed, other_worker, again = (set(drawn[start : start + 8]) for start in range(0, 32, 8))
    assert len(first | other_seed | other_worker) == 6
    assert again == first


def test_a_parameter_without_a_gradient_stays_where_it_is():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    before = model["idle"].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with serve(torch.optim.AdamW) as server, attach(model, optimizer, PushPull(server.ticket(0))):
        for _ in range(3):
            model["used"](torch.ones(1, 3)).sum().backward()
            optimizer.step()
    assert torch.equal(model["idle"].weight, before)


def test_two_workers_without_a_bound_learn():
    generator = torch.Generator().manual_seed(3)
    right = torch.randn(6, 3, generator=generator)

    def task(rank):
        for n in range(150):
            x, _ = batch(rank, n)
            yield x, torch.tanh(x @ right)

    with serve(ADAGRAD, shards=2, workers=2) as server:
        methods = [PushPull(server.ticket(rank)) for rank in range(2)]
        together([lambda r=r, m=m: work(m, task(r)) for r, m in enumerate(methods)])
    model = network()
    x, _ = batch(9, 9)

    @torch.no_grad()
    def loss():
        return float((model(x) - torch.tanh(x @ right)).pow(2).mean())

    untrained = loss()
    model.load_state_dict({name: p for shard in server.shards for name, p in shard.parameters.items()})
    assert loss() < 0.15 * untrained


def test_a_gradient_that_is_not_finite_stops_the_step_and_is_not_sent():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with serve(MOMENTUM) as server:
        before = copy.deepcopy(model.state_dict())
        with (
            attach(model, optimizer, PushPull(server.ticket(0))),
            pytest.raises(NonFiniteError, match=r"gradient of 0\.weight"),
        ):
            train(model, optimizer, [(torch.full((8, 6), float("nan")), torch.zeros(8, 3))])
        assert server.versions == [0]
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_a_gradient_that_is_not_finite_does_not_spoil_what_is_accrued():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with serve(MOMENTUM) as server:
        method = PushPull(server.ticket(0), push_every=3, pull_every=3)
        with attach(model, optimizer, method):
            train(model, optimizer, [batch(0, 0)])
            before = {name: x.clone() for name, x in method.accrued.items()}
            list(model.parameters())[-1].grad.fill_(torch.inf)
            with pytest.raises(NonFiniteError, match=r"gradient of 2\.bias"):
                optimizer.step()
            assert all(torch.equal(before[name], x) for name, x in method.accrued.items())


def test_what_is_accrued_later_is_not_in_a_state_given_before():
    model = network()
    optimizer = PLAIN(model.parameters())
    with serve(PLAIN) as server:
        method = PushPull(server.ticket(0), push_every=9, pull_every=9)
        with attach(model, optimizer, method) as session:
            train(model, optimizer, [batch(0, 0)])
            given, state = copy.deepcopy(method.accrued), session.state_dict()
            for _ in range(2):
                train(model, optimizer, [batch(0, 1)])
                session.load_state_dict(state)
                assert all(torch.equal(given[name], x) for name, x in method.accrued.items())


def test_what_cannot_be_is_refused():
    with serve(MOMENTUM, shards=2) as server:
        ticket = server.ticket(0)
        for wrong in ({"push_every": 0}, {"pull_every": 0}, {"bound": -1}, {"warm_start": -1}):
            with pytest.raises(ValueError, match=r"at least one step|numbers of pushes"):
                PushPull(ticket, **wrong)
        for model, match in (
            (network().double(), "float64: use model.float"),
            (nn.Linear(2, 1, bias=False), "1 param"),
        ):
            with pytest.raises(ValueError, match=match):
                attach(model, torch.optim.SGD(model.parameters(), lr=0.1), PushPull(ticket))


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "every"), [(PLAIN, 4), (MOMENTUM, 1)], ids=["plain", "momentum"])
def test_with_overlap_one_worker_is_plain_training(optimizer, every):
    plain = network()
    expected = train(plain, optimizer(plain.parameters()), (batch(0, n) for n in range(24)))
    model = network()
    own = optimizer(model.parameters())
    with serve(optimizer, shards=2) as server:
        method = PushPull(server.ticket(0), push_every=every, pull_every=every, overlap=True)
        with attach(model, own, method) as session:
            found = train(model, own, (batch(0, n) for n in range(24)))
            session.settle()  # the last push may be under way
            assert server.versions == [24 // every] * 2
            assert not method._since
    for a, b, p in zip(found, expected, model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(p.detach(), b, atol=1e-5, rtol=1e-5)


def test_with_overlap_every_gradient_of_every_worker_arrives_once():
    def job(server, rank, seen):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        own = torch.optim.SGD(model.parameters(), lr=1.0)
        with attach(model, own, PushPull(server.ticket(rank), push_every=2, pull_every=2, overlap=True)) as session:
            for _ in range(7):
                own.zero_grad()
                model(torch.ones(1, 1)).sum().backward()  # a gradient of one, wherever it is taken
                own.step()
                seen.append(float(model.weight.detach()))
            session.settle()

    alone: list[float] = []
    with serve(PLAIN) as server:
        job(server, 0, alone)
        lr = -float(next(iter(server.shards[0].parameters.values())).detach()) / 7
    assert alone[1] == -2.0
    assert alone[3] == pytest.approx(-2 * lr - 2.0)  # the server's first answer, and two steps since
    several: list[list[float]] = [[], []]
    with serve(PLAIN, workers=2) as server:
        together([lambda rank=rank: job(server, rank, several[rank]) for rank in range(2)])
        assert server.versions == [8]
        assert float(server.shards[0].parameters["weight"].detach()) == pytest.approx(-14 * lr)
    with pytest.raises(ValueError, match="leave overlap out"):
        PushPull(server.ticket(0), overlap=True, bound=1)


def test_with_overlap_a_resumed_worker_begins_with_the_servers_weights():
    with serve(PLAIN) as server:
        model, method = network(), PushPull(server.ticket(0), push_every=2, pull_every=2, overlap=True)
        own = PLAIN(model.parameters())
        with attach(model, own, method) as session:
            train(model, own, [batch(0, n) for n in range(5)])
            state = session.state_dict()
            train(model, own, [batch(0, n) for n in range(5, 8)])
            session.load_state_dict(state)
            assert (method.steps, server.versions) == (5, [4])
            assert method.accrued
            assert all(torch.equal(p, server.shards[0].parameters[name]) for name, p in model.named_parameters())


def test_the_package_does_not_need_pyzmq_until_a_server_starts():
    code = "import noctule.parallel, sys; sys.exit('zmq' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
