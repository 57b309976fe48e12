"""Sandblaster with mistakes and machines that end: each worker gets an error that says what and where, and none hangs."""

import dataclasses
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sandblaster_jobs as jobs
import torch
import zmq
from sandblaster_jobs import WOLFE, alone, loss_of, network, train

from noctule.core.errors import ExchangeError, NonFiniteError
from noctule.parallel import Sandblaster, coordinate
from noctule.testing.processes import Workers
from noctule.transport.messages import read, write
from noctule.transport.sockets import Client
from noctule.transport.ticket import Ticket

LBFGS = functools.partial(WOLFE, max_iter=3)


@pytest.mark.parametrize("what", ["loss is nan", "gradient is not finite"])
def test_a_portion_that_is_not_finite_is_named_to_all_and_weights_are_as_before(what):
    with coordinate(LBFGS) as server:
        barrier = threading.Barrier(2)

        def work(worker):
            model = network()
            optimizer = Sandblaster(model.parameters(), server.ticket(worker), portions=6)
            closure = loss_of(model, 6)
            optimizer.step(closure)
            before = [p.detach().clone() for p in model.parameters()]
            barrier.wait()

            def broken(portion):
                loss = closure(portion)
                if portion == 4 and "nan" in what:
                    return loss * float("nan")
                if portion == 4:
                    model[0].bias.grad[0] = float("inf")
                return loss

            with pytest.raises(NonFiniteError, match=rf"portion 4 at step 1, computed by worker [01]: its {what}"):
                optimizer.step(broken)
            with pytest.raises(NonFiniteError, match="portion 4 at step 1"):
                optimizer.step(closure)
            optimizer.close()
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(work, range(2)))


def test_a_closure_that_raises_on_one_worker_leaves_its_portion_to_others():
    def fails(step, portion):
        raise OSError(f"portion {portion} cannot be read here")

    with coordinate(LBFGS) as server:
        with pytest.raises(OSError, match="portion 0 cannot be read here"):
            train(server.ticket(0), portions=6, steps=2, seconds=fails)
        losses, weights = train(server.ticket(1), portions=6, steps=2)
    expected, wanted = alone(LBFGS, portions=6, steps=2)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))


@pytest.mark.parametrize("wrong", ["server_key", "public_key"])
def test_a_worker_without_the_key_gets_nothing(wrong):
    public, secret = (key.decode() for key in zmq.curve_keypair())
    with coordinate(LBFGS) as server:
        ticket = server.ticket(0)
        if wrong == "server_key":
            stranger = dataclasses.replace(ticket, server_key=public)
        else:
            stranger = dataclasses.replace(ticket, public_key=public, secret_key=secret)
        with pytest.raises(
            ExchangeError, match=r"worker 0 has had no answer .* for 0\.4 s .* A client without a known key"
        ):
            train(stranger, portions=2, steps=1, timeout_seconds=0.4)
        train(ticket, portions=2, steps=1)
    with pytest.raises(ExchangeError, match="leads nowhere") as error:
        train(dataclasses.replace(ticket, server_key="short"), portions=2, steps=1)
    assert ticket.secret_key not in str(error.value) + repr(server)


def test_a_worker_that_waits_for_worker_0_in_vain_learns_why():
    with coordinate(LBFGS) as server, pytest.raises(ExchangeError, match="says that worker 0 has not come with"):
        train(server.ticket(1), portions=2, steps=1, timeout_seconds=2.0)


def test_an_answer_that_does_not_come_is_named():
    with coordinate(LBFGS) as server:
        model = network()
        optimizer = Sandblaster(model.parameters(), server.ticket(0), portions=3, timeout_seconds=2.0)
        closure = loss_of(model, 3)

        def ends(portion):
            if portion == 1:
                server.close()
            return closure(portion)

        with pytest.raises(ExchangeError, match=r"worker 0 has had no answer to its gradient of portion 1, for 2 s"):
            optimizer.step(ends)
        optimizer.close()


def test_a_long_wait_for_others_is_no_error():
    with coordinate(LBFGS) as server, ThreadPoolExecutor(2) as threads:
        begun = threading.Event()

        def slowly(step, portion):
            begun.set()
            return 1.5  # longer than the timeout of the other worker

        first = threads.submit(train, server.ticket(0), portions=1, steps=1, seconds=slowly)
        begun.wait()
        server._coordinator._seconds.extend([10.0] * 9)  # so that it is not late
        second = threads.submit(train, server.ticket(1), portions=1, steps=1, timeout_seconds=1.0)
        assert first.result()[0] == second.result()[0]
        assert server.wasted[1] == 0


def test_workers_that_do_not_fit_get_an_error_that_says_where():
    with coordinate(LBFGS) as server:
        train(server.ticket(0), portions=4, steps=1)
        with pytest.raises(
            ExchangeError, match=r"worker 1 differs from worker 0 in 'portions': '5', where that one has '4'"
        ):
            train(server.ticket(1), portions=5, steps=1)
        with pytest.raises(
            ExchangeError, match=r"'0\.weight': 'float32 \(5, 4\)', where that one has 'float64 \(5, 4\)'"
        ):
            train(server.ticket(1), portions=4, steps=1, dtype=torch.float32)
        model = network()
        for match, wrong in (
            ("all float32 or all float64, and '0.weight' is torch.bfloat16", network().bfloat16().named_parameters()),
            ("at least one portion, got portions=0", model.parameters()),
            ("give them in one group", [{"params": [p]} for p in model.parameters()]),
        ):
            with pytest.raises(ValueError, match=match):
                Sandblaster(wrong, server.ticket(0), portions=0 if "portions=0" in match else 4)


def test_nonsense_is_answered_and_the_coordinator_continues():
    with coordinate(LBFGS, max_bytes=100_000) as server:
        ours, theirs = (Client(server.ticket(worker), server.addresses[0]) for worker in (1, 0))

        def ask(*frames, client=ours):
            client.send(list(frames))
            return read(client.receive(5) or [])[0]

        assert "header in JSON" in ask(b"nonsense")["error"]
        assert "no request 'dance'" in ask(*write({"kind": "dance", "serial": 1}))["error"]
        assert "must say 'serial'" in ask(*write({"kind": "work"}))["error"]
        join = {"kind": "join", "serial": 1, "facts": {}, "portions": 2, "dtype": "float64"}
        for wrong in ({"portions": 0}, {"dtype": "int8"}, {"facts": 3}):
            assert "error" in ask(*write({**join, **wrong}, [b"x" * 16]), client=theirs)
        assert "error" in ask(*write(join, [b"x" * 15]), client=theirs)
        train(server.ticket(0), portions=2, steps=1)
        assert "'portions'" in ask(*write(join))["error"]
        work = {"kind": "work", "serial": 2, "step": 1}
        assert ask(*write(work), client=theirs)["portion"] == 0
        wrong = {"version": server._coordinator._weights.version, "portion": 0, "loss": 0.0}
        assert "sent 8 bytes as the gradient" in ask(*write({**work, "did": wrong}, [b"x" * 8]), client=theirs)["error"]
        ours.send([b"x" * (5 << 20)])  # cut off, before memory is taken
        assert ours.receive(0.3) is None
        ours.close()
        theirs.close()
        losses, _ = train(server.ticket(0), portions=2, steps=2)
    assert losses == alone(LBFGS, portions=2, steps=2)[0]


def test_weights_that_were_changed_elsewhere_are_overwritten():
    with coordinate(LBFGS) as server:
        model = network()
        optimizer, losses = Sandblaster(model.parameters(), server.ticket(0), portions=2), []
        for _ in range(3):
            losses.append(optimizer.step(loss_of(model, 2)))
            model.load_state_dict(network(seed=5).state_dict())
        wider = network(width=6)
        optimizer.param_groups[0]["params"] = list(wider.parameters())
        with pytest.raises(ExchangeError, match="37 weights came for 44: did the model change its size"):
            optimizer.step(loss_of(wider, 2))
        optimizer.close()
    assert losses == alone(LBFGS, portions=2, steps=3)[0]


def test_a_resumed_worker_counts_on(tmp_path):
    with coordinate(LBFGS) as server:
        model = network()
        optimizer = Sandblaster(model.parameters(), server.ticket(0), portions=2)
        losses = [optimizer.step(loss_of(model, 2)) for _ in range(2)]
        kept = optimizer.state_dict()
        optimizer.close()
        optimizer = Sandblaster(model.parameters(), server.ticket(0), portions=2)
        optimizer.load_state_dict(kept)
        losses.append(optimizer.step(loss_of(model, 2)))
        optimizer.close()
    assert losses == alone(LBFGS, portions=2, steps=3)[0]


def test_a_coordinator_that_ends_within_a_step_leaves_weights_and_state_as_before_it(tmp_path):
    steps = []

    def fails(step, portion):
        steps.append(step)
        if steps.count(1) == 2 * 3 + 1:  # in the middle of step 1: its third point
            raise OSError("abandoned here")
        return 0.0

    with coordinate(LBFGS, folder=tmp_path) as server, pytest.raises(OSError, match="abandoned here"):
        train(server.ticket(0), portions=3, steps=3, seconds=fails)
    with coordinate(LBFGS, folder=tmp_path) as server:
        assert len(server.losses) == 1
        losses, weights = train(server.ticket(0), portions=3, steps=3)
    expected, wanted = alone(LBFGS, portions=3, steps=3)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))


def test_after_a_portion_that_is_not_finite_a_new_coordinator_repeats_the_step(tmp_path):
    model = network()
    closure = loss_of(model, 2)
    with coordinate(LBFGS, folder=tmp_path) as server:
        optimizer = Sandblaster(model.named_parameters(), server.ticket(0), portions=2)
        optimizer.step(closure)
        calls = []
        with pytest.raises(NonFiniteError, match="portion 1 at step 1"):
            optimizer.step(
                lambda portion: closure(portion) * (float("nan") if calls.append(portion) or len(calls) == 4 else 1)
            )
        optimizer.close()
    with coordinate(LBFGS, folder=tmp_path) as server:
        losses, weights = train(server.ticket(0), portions=2, steps=3)
    expected, wanted = alone(LBFGS, portions=2, steps=3)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))


@pytest.mark.parametrize("kills", [[1], pytest.param([0, 2, 3, 5], marks=pytest.mark.slow)])
def test_a_coordinator_that_is_killed_continues_from_the_last_step(tmp_path, kills):
    steps, portions = kills[-1] + 3, 6
    expected, wanted = alone(LBFGS, portions=portions, steps=steps)
    with Workers(1, group=False) as processes, ThreadPoolExecutor(2) as threads:

        def begin():
            processes.begin(jobs.run_coordinator, str(tmp_path), {"max_iter": 3}, 2)

        def await_(what):
            deadline = time.monotonic() + 20
            while not what():
                assert time.monotonic() < deadline
                time.sleep(0.005)

        begin()
        await_((tmp_path / "worker-1.json").exists)
        at = [0]

        def slowly(step, portion):
            at[0] = max(at[0], step)
            return 0.005

        found = [
            threads.submit(train, Ticket.load(path), portions=portions, steps=steps, seconds=slowly)
            for path in sorted(tmp_path.glob("worker-*.json"))
        ]
        for step in kills:
            await_(lambda step=step: at[0] >= step)
            processes.kill(0)
            processes.start(0)
            begin()
        for one in found:
            losses, weights = one.result()
            assert losses == expected
            assert all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))


def test_a_folder_is_of_one_coordinator(tmp_path):
    with (
        coordinate(LBFGS, folder=tmp_path),
        pytest.raises(ExchangeError, match=r"cannot listen at .* Does another server run"),
    ):
        coordinate(LBFGS, folder=tmp_path)
    assert (tmp_path / "keys.json").stat().st_mode & 0o077 == 0
