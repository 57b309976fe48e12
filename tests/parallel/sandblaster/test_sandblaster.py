"""Sandblaster is L-BFGS, and which worker computes a portion changes no bit; with slow, stopped and killed processes too."""

import functools
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
import sandblaster_jobs as jobs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sandblaster_jobs import WOLFE, Actor, alone, network, train
from torch.nn.functional import cross_entropy

from noctule.data import load
from noctule.models import mlp
from noctule.parallel import Sandblaster, coordinate
from noctule.parallel.sandblaster.coordinator import Coordinator
from noctule.testing.call import WorkerError
from noctule.testing.processes import Workers

LBFGS = functools.partial(WOLFE, max_iter=4, history_size=5)
STEPS = 3


@functools.cache
def expected(portions, steps=STEPS):
    return alone(LBFGS, portions=portions, steps=steps)


def same(found, wanted):
    (losses, weights), (wanted_losses, wanted_weights) = found, wanted
    return losses == wanted_losses and all(torch.equal(a, b) for a, b in zip(weights, wanted_weights, strict=True))


def await_(what):
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@settings(max_examples=30, deadline=None)
@given(
    portions=st.integers(1, 7),
    moves=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["move"] * 12 + ["sleep", "die"])), max_size=80),
)
def test_all_bits_are_the_same_whichever_worker_computes_what_and_dies_when(portions, moves):
    now, inbox = [0.0], defaultdict(list)
    coordinator = Coordinator(LBFGS, clock=lambda: now[0])
    actors = [Actor(coordinator, worker, portions, inbox) for worker in range(4)]

    def move(worker, what):
        now[0] += {"move": 1.0, "sleep": 30.0, "die": 1.0}[what]
        if what == "die":
            inbox[worker].clear()
            actors[worker] = Actor(coordinator, worker, portions, inbox)
        else:
            actors[worker].move()
        for route, answer in coordinator.tick():
            inbox[int(route)].append(answer)

    for worker, what in moves:
        move(worker, what)
    for _ in range(5000):
        if min(actor.steps for actor in actors) >= STEPS:
            break
        for worker, actor in enumerate(actors):
            if actor.steps < STEPS:
                move(worker, "move")
    coordinator.close()
    weights = [p.detach() for p in actors[0].model.parameters()]
    assert all(actor.losses[:STEPS] == expected(portions)[0] for actor in actors)
    if all(actor.steps == STEPS for actor in actors):
        assert same((actors[0].losses, weights), expected(portions))
    assert sum(coordinator.counted.values()) % portions == 0


def test_a_worker_that_is_behind_gets_the_weights_of_a_completed_step_not_of_a_trial():
    inbox = defaultdict(list)
    coordinator = Coordinator(LBFGS)
    ahead, behind = (Actor(coordinator, worker, 2, inbox) for worker in (0, 1))
    while ahead.steps < 1 or coordinator._weights.version < coordinator._settled.version + 2:
        ahead.move()
    while behind.steps < 1:
        behind.move()
    coordinator.close()
    weights = [p.detach() for p in behind.model.parameters()]
    assert same((behind.losses, weights), expected(2, steps=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strong_wolfe", [True, False])
def test_one_worker_is_lbfgs_of_torch(dtype, strong_wolfe):
    options = {"max_iter": 6, "history_size": 8, "lr": 1.0 if strong_wolfe else 0.2}
    options |= {"line_search_fn": "strong_wolfe" if strong_wolfe else None}
    model, steps = network(dtype=dtype), 4 if dtype is torch.float32 else 15
    optimizer = torch.optim.LBFGS(model.parameters(), **options)
    x, y = jobs.batch(dtype)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum() / len(x)
        loss.backward()
        return loss

    theirs = [optimizer.step(closure).item() for _ in range(steps)]
    for portions in (1, 7):
        with coordinate(functools.partial(torch.optim.LBFGS, **options)) as server:
            losses, weights = train(server.ticket(0), portions=portions, steps=steps, dtype=dtype)
        close = 1e-3 if dtype is torch.float32 else 1e-5
        assert losses == pytest.approx(theirs, rel=close)
        assert all(torch.allclose(a, b, atol=close) for a, b in zip(weights, model.parameters(), strict=True))
    assert losses[-1] < losses[0] / 5


def test_several_workers_are_one_and_all_have_the_same():
    with coordinate(LBFGS) as server, ThreadPoolExecutor(3) as threads:
        tickets = [server.ticket(worker) for worker in (1, 2, 0)]  # each with weights of its own, and 0 comes last
        found = list(threads.map(lambda ticket: train(ticket, portions=8, steps=STEPS), tickets))
        assert server.losses == expected(8)[0]
    assert all(same(one, expected(8)) for one in found)


def test_the_number_of_portions_is_a_matter_of_rounding():
    losses, weights = expected(1)
    for portions in (2, 5, 24, 30):  # the last has empty portions
        others, theirs = expected(portions)
        assert others == pytest.approx(losses, rel=1e-9)
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(weights, theirs, strict=True))


def test_slow_stopped_and_killed_processes(tmp_path):
    """One set of processes for all stories, each with a coordinator of its own."""
    portions, second = 12, 0.004
    where = str(tmp_path / "{}.json")

    def give_out(server):
        for worker in range(3):
            server.ticket(worker).save(where.format(worker))

    with Workers(3, group=False) as processes:
        with coordinate(LBFGS) as server:  # worker 2 is slow
            give_out(server)
            found = processes.call(jobs.work, where, [second, second, 10 * second], STEPS, portions)
            assert all(same((one["losses"], one["weights"]), expected(portions)) for one in found)
            assert server.counted[2] < min(server.counted[0], server.counted[1])
        with coordinate(LBFGS) as server:  # worker 1 stands still until the others are done
            give_out(server)
            running = processes.begin(jobs.work, where, [second] * 3, STEPS, portions)
            await_(lambda: server.counted[1])
            processes.stop(1)
            await_(lambda: len(server.losses) == STEPS)
            assert not running.done[1]
            processes.resume(1)
            assert all(same((one["losses"], one["weights"]), expected(portions)) for one in running.results())
        with coordinate(LBFGS) as server:  # worker 0, whose weights they had, dies
            give_out(server)
            running = processes.begin(jobs.work, where, [second] * 3, STEPS, portions)
            await_(lambda: server.counted[0] and server.losses)
            processes.kill(0)
            died, *rest = running.outcomes()
            assert isinstance(died, WorkerError)
            assert all(same((one["losses"], one["weights"]), expected(portions)) for one in rest)
            late = train(server.ticket(0), portions=portions, steps=STEPS)  # it joins with nothing, and gets all
            assert same(late, expected(portions))


@pytest.mark.slow
def test_a_stop_that_is_longer_than_the_time_out_is_none(tmp_path):
    where = str(tmp_path / "{}.json")
    with Workers(2, group=False) as processes, coordinate(LBFGS) as server:
        for worker in range(2):
            server.ticket(worker).save(where.format(worker))
        running = processes.begin(jobs.work, where, [0.01] * 2, STEPS, 12, 2.0)
        for _ in range(3):  # once in a portion perhaps, and once in a wait
            await_(lambda: server.counted[1])
            processes.stop(1)
            time.sleep(2.5)
            processes.resume(1)
            time.sleep(0.05)
        assert all(same((one["losses"], one["weights"]), expected(12)) for one in running.results())


@pytest.mark.slow
def test_a_worker_that_is_four_times_slower_costs_what_it_does_not_do(tmp_path):
    portions, second, slowness, where = 48, 0.02, 4, str(tmp_path / "{}.json")

    def seconds(*each):
        with coordinate(LBFGS) as server:
            for worker in range(3):
                server.ticket(worker).save(where.format(worker))
            return max(one["seconds"] for one in processes.call(jobs.work, where, list(each), STEPS, portions))

    with Workers(3, group=False) as processes:
        seconds(0.0, 0.0, 0.0)  # they import what they need
        even, uneven = seconds(second, second, second), seconds(second, second, slowness * second)
    assert uneven < 1.3 * even * 3 / (2 + 1 / slowness), (even, uneven)


@pytest.mark.parametrize("hidden", [(), (16,)])
def test_digits_are_learned_as_well_as_with_torch(hidden):
    data, portions = load("digits"), 14
    x, y = data.train.inputs, data.train.targets
    cut = list(zip(x.tensor_split(portions), y.tensor_split(portions), strict=True))

    def new():
        torch.manual_seed(0)
        return mlp(64, *hidden, 10)

    def accuracy(model):
        return (model(data.test.inputs).argmax(1) == data.test.targets).float().mean().item()

    theirs, ours = new(), new()
    oracle = torch.optim.LBFGS(theirs.parameters(), max_iter=8, history_size=10, line_search_fn="strong_wolfe")

    def whole():
        oracle.zero_grad()
        loss = cross_entropy(theirs(x), y)
        loss.backward()
        return loss

    def closure(portion):
        inputs, targets = cut[portion]
        loss = cross_entropy(ours(inputs), targets, reduction="sum") / len(x)
        loss.backward()
        return loss

    with coordinate(functools.partial(LBFGS, max_iter=8, history_size=10)) as server:
        optimizer = Sandblaster(ours.named_parameters(), server.ticket(0), portions=portions)
        for _ in range(5):
            expected_loss, loss = oracle.step(whole).item(), optimizer.step(closure)
        optimizer.close()
    assert loss < 2 * expected_loss + 0.01
    assert accuracy(ours) > max(0.9, accuracy(theirs) - 0.015)
