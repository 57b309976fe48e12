"""Workers run functions, report errors with their place, and can be killed, stopped and started again."""

import os
import subprocess
import sys
import time
from pathlib import Path

import group_functions as functions
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from noctule.core.errors import NoctuleError
from noctule.testing.link import Link, available, shaped_network
from noctule.testing.processes import WorkerError, Workers, fork_server, run_workers

REASON = available()
needs_network = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def shared_workers():
    with Workers(2) as workers:
        yield workers


@pytest.fixture
def workers(shared_workers: Workers):
    """Two living workers in one group, whatever the test before did to them."""
    if shared_workers.alive != [0, 1]:
        for rank in {0, 1} - set(shared_workers.alive):
            shared_workers.start(rank)
        shared_workers.form_group()
    return shared_workers


def test_each_rank_gives_its_result_in_order(workers):
    x, y = workers.call(functions.mean, torch.tensor([2.0, 4.0]))
    assert x.tolist() == y.tolist() == [2.0, 4.0]
    replies = workers.call("group_functions:who")
    assert [(s["rank"], s["workers"], s["group"], s["threads"]) for s in replies] == [(0, 2, 0, 1), (1, 2, 1, 1)]
    assert len({os.getpid(), *(s["process"] for s in replies)}) == 3
    assert [s["process"] for s in workers.call(functions.who)] == [s["process"] for s in replies]  # they stay
    assert workers.call(functions.sleep_on, -1, 0.0, ranks=[1]) == [1]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values)
def test_plain_values_come_back_as_they_went(workers, value):
    assert workers.call(functions.echo, value) == [[value], [value]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_come_back_as_they_went(workers, dtype):
    x = torch.arange(6).reshape(2, 3).to(dtype)
    for (y,) in workers.call(functions.echo, x):
        assert y.dtype is dtype
        assert y.equal(x)


def test_an_error_names_its_rank_and_line_and_the_group_lives_on(workers):
    with pytest.raises(WorkerError, match="rank 1: KeyError: 'no luck on 1'") as caught:
        workers.call(functions.fail_alone, 1)
    assert (caught.value.rank, caught.value.kind) == (1, "KeyError")
    assert "in fail_alone" in str(caught.value)
    assert isinstance(caught.value, NoctuleError)
    value, error = workers.begin(functions.fail_alone, 1).outcomes()
    assert value == 0
    assert isinstance(error, WorkerError)
    assert workers.alive == [0, 1]
    assert workers.call(functions.mean, torch.ones(1))[0] == 1


def test_a_failing_rank_ends_the_ranks_that_wait_for_it(workers):
    with pytest.raises(WorkerError, match="rank 0: KeyError") as caught:
        workers.call(functions.fail_on, 0)
    assert "rank 1: killed" in caught.value.__notes__[0]
    assert workers.alive == [0]


def test_a_death_comes_with_its_last_words(workers):
    with pytest.raises(
        WorkerError, match="rank 1: died: it ended with exit code 3\nthese are its last words"
    ) as caught:
        workers.call(functions.exit_on, 1)
    assert caught.value.rank == 1
    assert workers.alive == [0]


def test_a_rank_that_times_out_is_named_with_its_place_and_killed(workers):
    with pytest.raises(WorkerError, match=r"of 2 ranks \[1\] were not done after 0.5 s") as caught:
        workers.call(functions.sleep_on, 1, 60.0, timeout_seconds=0.5)
    assert caught.value.kind == "timeout"
    assert "in sleep_on" in str(caught.value)
    assert workers.alive == [0]


def test_a_kill_reaches_the_survivor_which_works_alone_and_then_with_another(workers):
    running = workers.begin(functions.reduce_on_and_on, 60.0)
    time.sleep(0.2)
    workers.kill(1)
    time.sleep(0.5)  # both are found at one look
    survivor, dead = running.outcomes(timeout_seconds=20)
    assert str(dead) == "rank 1: died: it was ended by SIGKILL"
    assert survivor.kind == "RuntimeError"
    with pytest.raises(WorkerError, match="rank 1: died") as caught:  # the cause comes first
        running.results()
    assert caught.value.__notes__ == [str(survivor)]
    workers.form_group()
    assert workers.call(functions.who)[0]["workers"] == 1
    workers.start(1)
    workers.form_group([1, 0])  # numbered in this order
    assert [s["group"] for s in workers.call(functions.who, ranks=[0, 1])] == [1, 0]
    assert workers.call(functions.mean, torch.ones(1)) == [1, 1]
    workers.form_group()
    assert running.outcomes() == [survivor, dead]  # what was, stays


def test_a_stopped_worker_answers_when_it_is_resumed(workers):
    workers.stop(1)
    running = workers.begin(functions.mean, torch.ones(1))
    time.sleep(0.3)
    assert not any(running.done)
    workers.resume(1)
    assert running.results() == [1, 1]


def test_a_living_worker_is_not_started_again(workers):
    with pytest.raises(ValueError, match="rank 1 is running"):
        workers.start(1)


def test_functions_that_cannot_be_found_are_refused_before_anything_is_sent(workers):
    for wrong in (lambda rank, workers: None, "no_colon"):
        with pytest.raises(ValueError, match="module"):
            workers.call(wrong)
    with pytest.raises(NoctuleError, match="a function"):
        workers.call(functions.echo, print)
    with pytest.raises(WorkerError, match=r"AttributeError: .*no_such"):
        workers.call("group_functions:no_such")
    with pytest.raises(WorkerError, match=r"CheckpointError: .*function"):
        workers.call(functions.unsavable)
    assert workers.alive == [0, 1]


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match="workers=0"):
        Workers(0)


def test_workers_have_the_threads_environment_and_modules_of_the_caller(workers, tmp_path, monkeypatch):
    (tmp_path / "written_later.py").write_text("import os\ndef word(rank, workers): return os.environ['LATER']")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LATER", "yes")
    with Workers(1, threads=2, group=False) as later:
        assert later.call("written_later:word") == ["yes"]
        assert later.call(functions.who)[0]["threads"] == 2
        assert later.call(functions.square, torch.ones(300, 300))[0].eq(300).all()


LEAVING = """
import os, group_functions
from noctule.testing.processes import Workers
workers = Workers(1, group=False)
print(workers.call(group_functions.who)[0]["process"], flush=True)
workers.begin(group_functions.sleep_on, 0, 100.0)
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_workers_do_not_outlive_their_parent():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", LEAVING], env=environment, stdout=subprocess.PIPE, timeout=120)
    assert run.returncode == -9
    process = Path(f"/proc/{int(run.stdout)}")
    deadline = time.monotonic() + 10
    while process.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process.exists()


@pytest.mark.slow
def test_a_fork_server_that_died_is_started_again(workers):
    server = fork_server(os.getpid())
    server._process.kill()
    server._process.wait()
    with pytest.raises(WorkerError, match="died"):
        workers.call(functions.who, ranks=[0])
    with pytest.raises(ValueError, match="no living worker"):
        workers.call(functions.who)
    with Workers(1, group=False) as others:
        assert workers.alive == []
        assert others.call(functions.echo, 3) == [[3]]


def test_fresh_processes_for_one_call():
    replies = run_workers(functions.who, workers=3, threads=2)
    assert [(s["rank"], s["workers"], s["group"], s["threads"]) for s in replies] == [(r, 3, r, 2) for r in range(3)]
    assert not any(Path(f"/proc/{s['process']}").exists() for s in replies)
    with pytest.raises(WorkerError, match=r"\[0\] were not done after 1 s"):
        run_workers(functions.sleep_on, arguments=[0, 60.0], timeout_seconds=1)


@needs_network
def test_a_group_over_a_link_takes_its_time_fails_when_it_freezes_and_forms_again():
    numbers = 250_000
    with (
        shaped_network(2, link=Link(megabits=100, delay_ms=5)) as network,
        Workers(2, network=network, group_timeout_seconds=1.5) as workers,
    ):
        workers.call(functions.timed_reduce, numbers)  # connections find their speed
        before = network.bytes_sent(0)
        seconds = max(workers.call(functions.timed_reduce, numbers))
        sent = network.bytes_sent(0) - before
        assert seconds > 4e-6 * 8 * numbers / 100
        assert sent == pytest.approx(4 * numbers * 1500 / 1448, rel=0.06)  # with acknowledgements of the other's
        network.freeze()
        begin = time.monotonic()
        for outcome in workers.begin(functions.mean, torch.ones(10)).outcomes(timeout_seconds=60):
            assert outcome.kind == "RuntimeError"
            assert "1500ms" in outcome.message  # the group's own time-out, not ours
        assert time.monotonic() - begin > 1.4
        network.thaw()
        workers.form_group()
        assert workers.call(functions.mean, torch.ones(1)) == [1, 1]
