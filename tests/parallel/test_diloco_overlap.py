"""Exchanges that are under way while training goes on: what comes counts from one step on, and nothing is lost."""

import copy
import threading

import diloco_cases as cases
import pytest
import torch
from torch import nn

from exchange_cases import Half, together
from noctule import set_
from noctule.codecs import NaturalCompression
from noctule.core.errors import LostWorkerError
from noctule.core.exchange import Channel
from noctule.core.method import attach
from noctule.exchange import Compress
from noctule.parallel import AVERAGE, NESTEROV, DiLoCo
from noctule.parallel.fragments import cut
from noctule.testing.processes import Workers


@pytest.mark.parametrize("blend", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("outer", [AVERAGE, NESTEROV])
def test_what_was_sent_is_applied_so_many_steps_later_and_blended(outer, blend):
    every, fragments, overlap, steps = 4, 2, 3, 13
    models = [cases.network() for _ in range(2)]
    twins = copy.deepcopy(models)

    def work(path):
        model = models[path.rank]
        optimizer = cases.sgd(model)
        options = {"every": every, "fragments": fragments, "overlap": overlap, "blend": blend}
        with attach(model, optimizer, DiLoCo(Channel(path=path), outer=outer, **options)):
            cases.train(model, optimizer, path.rank, 0, steps)
        return cases.weights(model)

    where = cut(dict(twins[0].named_parameters()), fragments)
    points = {name: nn.Parameter(p.detach().clone()) for name, p in twins[0].named_parameters()}
    outers = {name: outer([point]) for name, point in points.items()}
    optimizers, sent = [cases.sgd(twin) for twin in twins], {}
    for step in range(1, steps + 1):
        for rank, twin in enumerate(twins):
            cases.train(twin, optimizers[rank], rank, step - 1, step)
        for name, point in points.items():
            several = [twin.get_parameter(name) for twin in twins]
            with torch.no_grad():
                if (name, step - overlap) in sent:
                    point.grad = sent[name, step - overlap]
                    outers[name].step()
                    for p in several:
                        p.copy_(blend * p + (1.0 - blend) * point)
                if (step - (where[name] + 1) * every // fragments) % every == 0:
                    sent[name, step] = torch.stack([point - p for p in several]).mean(0)
    for found, twin in zip(together(2, work), twins, strict=True):
        for a, b in zip(found, twin.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("fragments", "overlap"), [(1, 2), (3, 3), (3, 6)])
def test_nothing_depends_on_how_long_an_exchange_takes(fragments, overlap):
    models = [cases.network() for _ in range(2)]

    def run(slow):
        def work(path):
            model = copy.deepcopy(models[path.rank])
            optimizer = cases.sgd(model)
            inner = Channel(Compress(NaturalCompression(), error_feedback=True), path=path)
            exchange = cases.Told(inner, slow_seed=None if slow is None else slow + path.rank)
            method = DiLoCo(exchange, every=6, fragments=fragments, overlap=overlap)
            with attach(model, optimizer, method) as session:
                cases.train(model, optimizer, path.rank, 0, 20)
                apart = cases.weights(model)
                session.settle()
                points = [anchor.detach().clone() for anchor in method.anchors.values()]
            return apart, cases.weights(model), points

        return together(2, work)

    first, second, third = run(None), run(10), run(20)
    for a, b, c in zip(first, second, third, strict=True):
        for at in range(3):
            assert cases.same(a[at], b[at])
            assert cases.same(a[at], c[at])
    (apart_a, settled_a, points_a), (apart_b, settled_b, points_b) = first
    assert not cases.same(apart_a, apart_b)
    assert cases.same(settled_a, settled_b)
    assert cases.same(points_a, points_b)
    assert cases.same(settled_a, points_a)


def test_training_goes_on_while_an_exchange_is_under_way():
    gate = threading.Event()

    class Shut(cases.Told):
        def __call__(self, tensors, keys):
            assert gate.wait(30.0)
            return super().__call__(tensors, keys)

    def work(path):
        model = cases.network()
        optimizer, exchange = cases.sgd(model), Shut(Channel(path=path))
        with attach(model, optimizer, DiLoCo(exchange, every=4, fragments=2, overlap=3)):
            cases.train(model, optimizer, 0, 0, 4)  # the first of two under way is wanted after the next step
            assert not exchange.calls
            gate.set()
            cases.train(model, optimizer, 0, 4, 9)
        assert len(exchange.calls) == 4
        assert threading.current_thread() not in exchange.threads
        return exchange.threads

    (threads,) = together(1, work)
    assert len(set(threads)) == 1
    assert not threads[0].is_alive()


def test_settling_at_the_step_that_sent_is_a_plain_meeting():
    models = [cases.network() for _ in range(2)]

    def run(overlap):
        def work(path):
            model = copy.deepcopy(models[path.rank])
            optimizer, exchange = cases.sgd(model), cases.Told(Channel(path=path))
            with attach(model, optimizer, DiLoCo(exchange, every=4, overlap=overlap)) as session:
                cases.train(model, optimizer, path.rank, 0, 4)
                session.settle()
            assert len(exchange.calls) == 1
            return cases.weights(model)

        return together(2, work)

    for plain, overlapped in zip(run(0), run(3), strict=True):
        assert cases.same(plain, overlapped)


@pytest.mark.parametrize("lost_at", [(1,), (2,), (2, 3), (4, 5, 6)])
@pytest.mark.parametrize("codec", [None, Half()], ids=["exact", "half"])
def test_what_failed_is_raised_where_it_was_wanted_and_then_sent_again_as_it_was(lost_at, codec):
    """So a training that lost exchanges on its way ends as one that did not."""
    models = [cases.network() for _ in range(2)]

    def run(lost):
        def work(path):
            model = copy.deepcopy(models[path.rank])
            stages = [] if codec is None else [Compress(codec)]
            optimizer, exchange = cases.sgd(model), cases.Told(Channel(*stages, path=path), lost_at=lost)
            method = DiLoCo(exchange, every=4, fragments=2, overlap=3)
            raised = []
            with attach(model, optimizer, method) as session:
                step = 0
                while step < 16:
                    try:
                        cases.train(model, optimizer, path.rank, step, step + 1)
                        step += 1
                    except LostWorkerError as error:
                        raised.append(str(error))
                        assert not any(p.isnan().any() for p in model.parameters())
                        state = copy.deepcopy(session.state_dict())  # which a worker that is lost leaves
                        session.load_state_dict(state)
                        step = method.steps
                session.settle()
            return cases.weights(model), raised

        return together(2, work)

    for (expected, none), (found, raised) in zip(run(()), run(lost_at), strict=True):
        assert not none
        assert raised == [f"lost at call {call}" for call in lost_at]
        assert cases.same(expected, found)


def test_an_error_is_raised_at_the_step_that_wanted_the_exchange_and_not_sooner():
    def work(path):
        model = cases.network()
        optimizer, exchange = cases.sgd(model), cases.Told(Channel(path=path), lost_at=(1,))
        method = DiLoCo(exchange, every=4, overlap=2)
        with attach(model, optimizer, method) as session:
            cases.train(model, optimizer, 0, 0, 5)
            session.state_dict()  # says nothing of it either
            with pytest.raises(LostWorkerError, match="lost at call 1"):
                cases.train(model, optimizer, 0, 5, 6)
            assert (method.steps, method.met) == (6, 0)
            cases.train(model, optimizer, 0, 6, 7)
            assert method.met == 4
        assert exchange.tries == 2

    together(1, work)


@pytest.mark.parametrize("how", ["settled", "left", "failed", "lost"])
def test_no_thread_is_left_behind(how):
    started = threading.Event()
    gate = threading.Event()

    class Slow(cases.Told):
        def __call__(self, tensors, keys):
            started.set()
            gate.wait(0.2)
            return super().__call__(tensors, keys)

    def work(path):
        model = cases.network()
        exchange = Slow(Channel(path=path), lost_at=(1,) if how == "lost" else ())
        optimizer, method = cases.sgd(model), DiLoCo(exchange, every=2, overlap=2)
        try:
            with attach(model, optimizer, method) as session:
                cases.train(model, optimizer, 0, 0, 3)
                assert started.wait(10.0)
                if how == "settled":
                    session.settle()
                if how == "failed":
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert how == "failed"
        assert not cases.threads_left()

    together(1, work)


@pytest.mark.parametrize("codec", [None, Half(), NaturalCompression()], ids=["exact", "half", "natural"])
def test_connections_that_move_are_followed_by_what_is_under_way(codec):
    """All workers go on alike, whether their exchange was done when connections moved or not."""
    models = [cases.network(sparse=True) for _ in range(2)]

    def run(slow):
        def work(path):
            model = copy.deepcopy(models[path.rank])
            stages = [] if codec is None else [Compress(codec, error_feedback=True)]
            exchange = cases.Told(Channel(*stages, path=path), slow_seed=slow)
            optimizer, method = cases.sgd(model), DiLoCo(exchange, every=6, fragments=2, overlap=4)
            with attach(model, optimizer, method, set_(every=2, seed=1)) as session:
                cases.train(model, optimizer, 0, 0, 15)  # the same batches, so that the same connections go
                session.settle()
            return cases.weights(model), [module.topology for module in model.modules() if hasattr(module, "topology")]

        return together(2, work)

    (first, places), (second, others) = run(None)
    assert places == others
    assert cases.same(first, second)
    assert cases.same(run(3)[1][0], first)


def test_of_what_is_under_way_survivors_keep_all_and_new_connections_have_gone_nowhere():
    model = cases.network(sparse=True)
    layer = model[1][0]

    def work(path):
        compress = Compress(Half())
        exchange = cases.Told(Channel(compress, path=path))
        optimizer, method = cases.sgd(model), DiLoCo(exchange, every=3, overlap=2, outer=AVERAGE)
        with attach(model, optimizer, method, set_(every=4, fraction=0.5, seed=1)):
            cases.train(model, optimizer, 0, 0, 3)
            places = layer.topology.keys()
            method.state_dict()  # it has come
            owed, before = compress.owed["1.0.values"].clone(), method.anchors["1.0.values"].detach().clone()
            cases.train(model, optimizer, 0, 3, 4)  # connections move
            after = layer.topology.keys()
            anchors = method.anchors["1.0.values"].detach().clone()
            cases.train(model, optimizer, 0, 4, 5)  # it lands
            gone, came = exchange.calls[0]["1.0.values"], exchange.totals[0]["1.0.values"]
            assert torch.equal(came + owed, gone)
            stay = torch.isin(after, places)
            left = torch.isin(places, after)
            assert 0 < int(stay.sum()) < len(after)
            point = method.anchors["1.0.values"].detach()
            torch.testing.assert_close(point[stay], before[left] - came[left])
            assert torch.equal(point[~stay], anchors[~stay])
            assert torch.equal(compress.owed["1.0.values"][stay], owed[left])
            assert float(compress.owed["1.0.values"][~stay].abs().sum()) == 0.0

    together(1, work)


def test_who_leaves_first_keeps_nobody_waiting():
    """What was sent is exchanged to the end, though nobody takes it any more."""

    def work(path):
        model = cases.network()
        exchange = cases.Told(Channel(path=path), slow_seed=path.rank or None)
        optimizer = cases.sgd(model)
        with attach(model, optimizer, DiLoCo(exchange, every=8, fragments=4, overlap=8)):
            cases.train(model, optimizer, path.rank, 0, 8)
        return len(exchange.totals)

    assert together(2, work, timeout_seconds=2.0) == [4, 4]


@pytest.fixture(scope="module")
def workers():
    with Workers(2, group_timeout_seconds=20.0) as group:
        yield group


@pytest.mark.parametrize("overlap", [0, 5])
def test_bytes_on_the_wire_peak_at_the_largest_fragment(workers, overlap):
    parameters = dict(cases.network().named_parameters())
    where = cut(parameters, 4)
    each = [sum(p.nbytes for name, p in parameters.items() if where[name] == at) for at in range(4)]
    for found in workers.call(cases.sent_at_each_step, 4, overlap, 16):
        growth = [b - a for a, b in zip([0, *found["sent"]], found["sent"], strict=False)]
        assert [bool(sent) for sent in growth] == [False, True] * 8
        first, *others = (sent for sent in growth if sent)
        numbers = max(others) - max(each)  # that say whether all are at the same exchange
        assert numbers < 64
        assert others == [size + numbers for size in [*each, *each][1:]]
        assert first > each[0] + numbers  # with the handshake
        assert not found["left"]


def test_an_exchange_on_the_group_of_all_is_refused(workers):
    for errors in workers.call(cases.on_everybodys_group):
        assert len(errors) == 2
        assert all("such as TwoPhase(own_group())" in error for error in errors)


def test_a_lost_worker_is_an_error_in_training_and_no_thread_is_left():
    with Workers(2, group_timeout_seconds=100.0) as group:
        found = group.begin(cases.until_lost).outcomes(timeout_seconds=150.0)[0]
    assert "could not finish" in found["error"]
    assert found["steps"] in (5, 7)  # where what was sent after steps 2 and 4 is wanted
    assert found["seconds"] < 60.0  # the time-out of the group is not waited for
    assert not found["left"]
