"""Workers that meet every so many steps: local SGD is the mean of their weights, and nothing else changes between meetings."""

import copy
import threading
from contextlib import ExitStack
from functools import partial

import diloco_cases as cases
import pytest
import torch
from torch import nn

from exchange_cases import Half, together
from noctule import ToSparse, convert_, rigl, set_
from noctule.codecs import NaturalCompression
from noctule.core.errors import ExchangeError, LostWorkerError
from noctule.core.exchange import Channel
from noctule.core.method import attach
from noctule.exchange import Compress
from noctule.parallel import AVERAGE, NESTEROV, DiLoCo, Phases

_DRAWING = threading.Lock()


def network(seed: int = 0, *, sparse: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return convert_(model, ToSparse(density=0.4)).model if sparse else model


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def steps(rank, count, start=0):
    for step in range(start, start + count):
        generator = torch.Generator().manual_seed(1000 * rank + step)
        yield torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)


def train(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("sparse", [False, True])
def test_local_sgd_is_the_mean_of_the_weights(every, sparse):
    models = [network(sparse=sparse) for _ in range(3)]
    twins = [copy.deepcopy(model) for model in models]

    def work(path):
        model = models[path.rank]
        optimizer = sgd(model)
        with attach(model, optimizer, DiLoCo(Channel(path=path), every=every, outer=AVERAGE)):
            return train(model, optimizer, steps(path.rank, 2 * every))

    optimizers = [sgd(twin) for twin in twins]
    for meeting in range(2):
        found = [
            train(twin, optimizer, steps(rank, every, meeting * every))
            for rank, (twin, optimizer) in enumerate(zip(twins, optimizers, strict=True))
        ]
        with torch.no_grad():
            for twin in twins:
                for p, several in zip(twin.parameters(), zip(*found, strict=True), strict=True):
                    p.copy_(torch.stack(several).mean(0))
    everyone = together(3, work)
    for weights in everyone:
        for a, b in zip(weights, twins[0].parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), atol=1e-6, rtol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(weights, everyone[0], strict=True))


def test_the_outer_step_is_nesterov_on_how_far_the_weights_went():
    models = [network() for _ in range(2)]
    begin = [p.detach().clone() for p in models[0].parameters()]

    def work(path):
        model = models[path.rank]
        optimizer = sgd(model)
        with attach(model, optimizer, DiLoCo(Channel(path=path), every=4)):
            return train(model, optimizer, steps(path.rank, 4))

    ends = [train(twin, sgd(twin), steps(rank, 4)) for rank, twin in enumerate(network() for _ in range(2))]
    for found in together(2, work):
        for x, before, *after in zip(found, begin, *ends, strict=True):
            gone = before - torch.stack(after).mean(0)
            torch.testing.assert_close(x, before - 0.7 * (gone + 0.9 * gone), atol=1e-6, rtol=1e-6)


def test_between_meetings_workers_differ_and_now_brings_them_together():
    models = [network() for _ in range(2)]

    def work(path):
        model = models[path.rank]
        optimizer, method = sgd(model), DiLoCo(Channel(path=path), every=100, outer=AVERAGE)
        with attach(model, optimizer, method):
            apart = train(model, optimizer, steps(path.rank, 3))
            assert (method.steps, method.met) == (3, 0)
            method.settle()
            assert (method.steps, method.met) == (3, 3)
            method.settle()  # nothing to do: another meeting would wait for the other worker
        return apart, [p.detach().clone() for p in model.parameters()]

    (first, together_a), (second, together_b) = together(2, work)
    assert not torch.equal(first[0], second[0])
    for a, b, x, y in zip(first, second, together_a, together_b, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, (a + b) / 2, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("outer", [AVERAGE, NESTEROV])
@pytest.mark.parametrize("codec", [None, Half(), NaturalCompression()], ids=["exact", "half", "natural"])
def test_resuming_is_never_having_stopped(outer, codec):
    models = [network(sparse=True) for _ in range(2)]

    def work(path):
        def session(model):
            stages = [] if codec is None else [Compress(codec, error_feedback=True)]
            optimizer = sgd(model)
            return optimizer, attach(model, optimizer, DiLoCo(Channel(*stages, path=path), every=3, outer=outer))

        whole = copy.deepcopy(models[path.rank])
        optimizer, opened = session(whole)
        with opened:
            expected = train(whole, optimizer, steps(path.rank, 10))
        first = copy.deepcopy(models[path.rank])
        optimizer, opened = session(first)
        with opened:
            train(first, optimizer, steps(path.rank, 6))
            saved = copy.deepcopy([first.state_dict(), optimizer.state_dict(), opened.state_dict()])
        second = copy.deepcopy(models[path.rank])
        second.load_state_dict(saved[0])
        optimizer, opened = session(second)
        optimizer.load_state_dict(saved[1])
        with opened:
            opened.load_state_dict(saved[2])
            found = train(second, optimizer, steps(path.rank, 4, 6))
        return expected, found

    for expected, found in together(2, work):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_connections_that_move_alike_are_followed():
    models = [network(sparse=True) for _ in range(2)]

    def work(path):
        model = models[path.rank]
        optimizer = sgd(model)
        method = DiLoCo(Channel(Compress(Half()), path=path), every=4)
        with attach(model, optimizer, method, set_(every=2, seed=1)):
            weights = train(model, optimizer, steps(0, 8))  # the same batches, so that the same connections go
        assert all(method.anchors[name].shape == p.shape for name, p in model.named_parameters())
        return weights, model[0].topology

    (first, places), (second, others) = together(2, work)
    assert places == others
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("lost_at", [1, 2, 4])
@pytest.mark.parametrize("where", ["side by side", "both in a phase", "one in a phase"])
@pytest.mark.parametrize(
    ("how", "moving"),
    [  # what RigL saw in a step is in no state: resumed there, it would not move connections
        *((how, set_) for how in ("going on", "resuming", "settling")),
        *((how, partial(rigl, until=100)) for how in ("going on", "settling")),
    ],
)
def test_connections_move_after_the_meeting_also_where_that_failed_and_is_made_up_for(how, lost_at, moving, where):
    """Or they would move by weights that differ from worker to worker, and not alike."""

    def session(path, stack, *lost):
        with _DRAWING:
            model = network(sparse=True)
        optimizer, sight = sgd(model), Channel(path=path)
        meeting = DiLoCo(cases.Told(Channel(path=path), lost_at=lost), every=2)
        move = moving(every=4, seed=1, exchange=sight)
        methods = {
            "side by side": lambda: (move, meeting),
            "both in a phase": lambda: (Phases([move, meeting], [], until=[100]),),
            "one in a phase": lambda: (move, Phases([meeting], [], until=[100])),
        }
        return model, optimizer, stack.enter_context(attach(model, optimizer, *methods[where]()))

    def work(path):
        with ExitStack() as stack:
            whole, optimizer, _ = session(path, stack)
            expected = train(whole, optimizer, steps(path.rank, 10))
        with ExitStack() as stack:
            model, optimizer, opened = session(path, stack, lost_at)
            for data in steps(path.rank, 10):
                try:
                    train(model, optimizer, [data])
                except LostWorkerError:
                    if how == "resuming":
                        saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), opened.state_dict()])
                        stack.close()
                        model, optimizer, opened = session(path, stack)
                        for piece, state in zip((model, optimizer, opened), saved, strict=True):
                            piece.load_state_dict(state)
                    elif how == "settling":
                        opened.settle()
            found = [p.detach().clone() for p in model.parameters()]
            assert opened.steps == 10
        assert not model._forward_pre_hooks
        return expected, found, whole[0].topology, model[0].topology

    first, second = together(2, work)
    assert first[2] == first[3] == second[3]
    for expected, found, *_ in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_new_connection_has_gone_nowhere_yet():
    model = network(sparse=True)

    def work(path):
        optimizer, method = sgd(model), DiLoCo(Channel(path=path), every=100, outer=AVERAGE)
        with attach(model, optimizer, method, set_(every=1, fraction=0.5, seed=1)):
            before = [p.detach().clone() for p in train(model, optimizer, steps(0, 1)) and model.parameters()]
            gone = method.anchors["0.values"] - model[0].values
            assert int((gone == 0).sum()) >= model[0].weights // 3
            method.now()
        for p, x in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), x, atol=1e-6, rtol=1e-6)

    together(1, work)


def test_connections_that_moved_apart_are_refused():
    models = [network(sparse=True) for _ in range(2)]

    def work(path):
        model = models[path.rank]
        optimizer = sgd(model)
        with (
            pytest.raises(ExchangeError, match=r"differ in '0.topology'.*must move alike"),
            attach(model, optimizer, DiLoCo(Channel(path=path), every=4), set_(every=2, seed=path.rank)),
        ):
            train(model, optimizer, steps(path.rank, 8))

    together(2, work)


def test_what_cannot_be_is_refused():
    def work(path):
        with pytest.raises(ValueError, match="every=0"):
            DiLoCo(Channel(path=path), every=0)
        model = network()
        with attach(model, sgd(model), DiLoCo(Channel(path=path), every=1)) as session:
            state = session.state_dict()
        other = nn.Linear(2, 2)
        method = DiLoCo(Channel(path=path), every=1)
        with (
            attach(other, sgd(other), method) as session,
            pytest.raises(ValueError, match="load the model's own state"),
        ):
            session.load_state_dict(state)

    together(1, work)
