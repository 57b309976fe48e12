import os
import time

import pytest
import torch

from noctule.measure.turns import Process, Unavailable, Workers, at_forget

A, B = Process("a"), Process("b", (("NOCTULE_BENCH_TEST", "yes"),))
forgotten = []


def build(seconds):
    at_forget(_note)

    def step():
        time.sleep(seconds)

    return step, (os.getpid(), torch.get_num_threads(), os.environ.get("NOCTULE_BENCH_TEST"))


def _note():
    forgotten.append(True)


def how_often_forgotten():
    return len(forgotten)


def refuse():
    raise Unavailable("not here")


def die():
    os._exit(3)


def test_each_works_in_its_process_and_they_take_turns_and_a_death_is_survived():
    with Workers(1) as workers:
        here, threads, variable = workers.prepare("short", A, build, 0.001)
        there, _, other = workers.prepare("long", B, build, 0.05)
        assert len({here, there, os.getpid()}) == 3
        assert (threads, variable, other) == (1, None, "yes")
        assert "NOCTULE_BENCH_TEST" not in os.environ
        taken = workers.take_turns(rounds=3, block_seconds=0.1)
        assert list(taken) == ["short", "long"]
        assert taken["short"].calls > taken["long"].calls >= 1
        assert all(len(turns.timing.samples) == 3 and turns.busy_cores < 0.9 for turns in taken.values())
        assert taken["short"].timing.minimum >= 0.001
        assert taken["long"].timing.minimum >= 0.05

        with pytest.raises(Unavailable, match="not here"):
            workers.run(A, refuse)
        with pytest.raises(Unavailable, match="died"):
            workers.run(A, die)
        assert list(workers.take_turns(rounds=1, block_seconds=0.0)) == ["long"]
        assert workers.prepare("again", A, build, 0.0)[0] != here

        workers.forget()
        assert workers.take_turns(rounds=1, block_seconds=0.0) == {}
        assert workers.run(A, how_often_forgotten) == 1
