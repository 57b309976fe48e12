"""`noctule bench faults` from its options to its lines and its table, in small; and what it would see."""

import json
from dataclasses import replace

import pytest

from noctule.core.errors import UsageError
from noctule_bench import faults, faults_link, faults_runs
from noctule_bench.faults_recipe import Step
from noctule_bench.faults_runs import Running, Stuck, Tail, differing, off
from noctule_bench.program import run as bench

SMALL = "--data digits --hidden 32".split()


def steps(process: int = 1) -> list[Step]:
    return [Step(0.1 * n, process, 1, 2, n, along=n / 7, digest=f"{n:x}") for n in range(1, 10)]


def run(capsys, *words: str) -> list[dict]:
    assert bench("faults", [*SMALL, *words]) == 0
    captured = capsys.readouterr()
    assert "faults: seconds until the training goes on" in captured.err
    return [json.loads(line) for line in captured.out.splitlines()]


@pytest.mark.slow
def test_a_killed_worker_and_its_replacement(capsys):
    killed, joined = run(capsys, "--rows", "worker", "--times", "1")
    assert killed["holds"], killed
    assert killed["off"] < 1e-9
    assert killed["lost"] in (0, 1)
    assert joined["holds"], joined
    assert joined["worst_seconds"] > 0.0
    assert killed["worst_seconds"] > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("row", ["server", "torchrun", "agent"])
def test_what_else_is_killed(row, capsys):
    (found,) = run(capsys, "--rows", row, "--times", "1")
    assert found["holds"], found
    assert found["times"] == len(found["seconds"]) == 1


@pytest.mark.slow
@pytest.mark.skipif(faults_link.available() is not None, reason=str(faults_link.available()))
def test_a_link_that_freezes(capsys):
    went_on, gave_up = run(capsys, "--rows", "frozen", "--times", "1", "--frozen-seconds", "3.5")
    assert went_on["holds"], went_on
    assert gave_up["holds"], gave_up
    assert gave_up["worst_seconds"] >= faults_link.IMPATIENCE - 0.5


@pytest.mark.slow
def test_a_soak(capsys):
    (found,) = run(capsys, "--rows", "soak", "--soak-seconds", "20", "--soak-every", "10", "--quiet-seconds", "5")
    assert found["kills"] == 2
    assert found["committed"] == pytest.approx(found["steps_per_second"] / found["steps_per_second_quiet"])


def test_a_step_that_is_lost_or_done_otherwise_is_seen():
    undisturbed = {step.step: step.along for step in steps()}
    assert off(steps(), undisturbed) == 0.0
    assert off([replace(steps()[4], along=5 / 7 + 1e-3)], undisturbed) > faults.ALIKE
    assert off([replace(steps()[4], step=6)], undisturbed) > faults.ALIKE
    assert off([replace(steps()[4], step=99)], undisturbed) == float("inf")


def test_weights_that_differ_are_seen_but_for_the_step_in_flight():
    mine, other = steps(1), steps(2)
    assert differing([mine, other], []) == 0
    other[-1] = replace(other[-1], digest="else")
    assert differing([mine, other], []) == 1
    assert differing([mine, other], [(2, 9)]) == 0
    assert differing([mine, other], [(1, 8)]) == 1


def test_a_line_that_is_not_whole_waits(tmp_path):
    tail, path = Tail(tmp_path / "steps.jsonl"), tmp_path / "steps.jsonl"
    assert tail.read() == []
    lines = [json.dumps(vars(step)) + "\n" for step in steps()]
    path.write_text(lines[0] + lines[1][:20])
    assert tail.read() == steps()[:1]
    path.write_text("".join(lines))
    assert tail.read() == steps()


def test_a_training_that_cannot_begin_is_said_and_nothing_is_left(tmp_path):
    with (
        pytest.raises(Stuck, match="there is no data set") as raised,
        Running(tmp_path, ["--data", "nothing"], workers=2) as running,
    ):
        running.until(running.together, "all workers took part", seconds=60.0)
    assert "ended with" in str(raised.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"times": 0}, "times must be at least 1"),
        ({"workers": 1}, "workers must be at least"),
        ({"rows": ("server", "agents")}, "did you mean agent"),
        ({"frozen_seconds": 2.0}, "a link freezes for longer"),
        ({"soak_every": 0.0}, "a soak takes some seconds"),
    ],
)
def test_what_cannot_be_is_refused(options, text):
    with pytest.raises(UsageError, match=text):
        faults.faults(**options)


DYING = """
import os, signal
from noctule_bench.faults_recipe import training as train
from noctule.launch import worker

def training(run, *, once: str = "", data: str = "digits", hidden: tuple[int, ...] = (32,)):
    join = worker.join_group
    def die(store, **where):
        if where["world"] == 3 and where["rank"] == 1 and not os.path.exists(once):
            open(once, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        join(store, **where)
    worker.join_group = die
    train(run, data=data, hidden=hidden)
"""


@pytest.mark.slow
def test_a_worker_that_dies_on_its_way_to_a_group_keeps_nobody_waiting(tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.setattr(faults_runs, "RECIPE", f"{tmp_path}/dying.py:training")
    with Running(tmp_path, ["--once", str(tmp_path / "once")], workers=3) as running:
        running.until(lambda: len(running.last()) >= 2, "the others went on")
        assert {steps[0].world for w in (0, 2) if (steps := running.steps(w))} == {2}  # before its replacement came
        running.until(running.together, "all workers took part")
