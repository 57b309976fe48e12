"""`kill -9` at random checkpoints, then `--resume`: the same weights as a run that was left alone."""

import json
import random
import signal
import time
from pathlib import Path

import pytest

OPTIONS = ["--hidden", "64", "64", "--density", "0.2", "--every", "7", "--threads", "1", "--checkpoint-seconds", "0.02"]
ONE_WAY = """
from noctule.recipes import sparse_mlp, twin

twin.WAYS = {"fp32": twin.WAYS["fp32"]}  # each run times the ways of its dense twin, and another way rounds otherwise
"""
MOMENTS = ("before", "written", "after")


def kill_and_resume(noctule_command, tmp_path: Path, *, epochs: int, kills: int) -> None:
    (tmp_path / "one_way.py").write_text(ONE_WAY)
    words = ["run", "one_way.py:sparse_mlp", *OPTIONS, "--epochs", epochs]
    whole = noctule_command(*words, "--out", "whole")
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    moments = random.Random(0)
    torn = tmp_path / "torn"
    command = [*words, "--out", "torn"]
    for _ in range(kills):
        process = noctule_command(*command, killed=(moments.randint(2, 9), moments.choice(MOMENTS)))
        _, err = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, err
        command = ["run", "--resume", "torn"]
    last = noctule_command(*command)
    _, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert (torn / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert accuracies(torn) == accuracies(tmp_path / "whole")
    assert (torn / "report.html").exists()


def files(run: Path) -> set[str]:
    return {str(p) for p in run.rglob("*.safetensors")} if run.exists() else set()


def accuracies(run: Path) -> list[tuple[object, ...]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["series"], r["epoch"], r["step"], r["validation_accuracy"], r["train_loss"]) for r in records]


def test_killed_twice(noctule_command, tmp_path):
    kill_and_resume(noctule_command, tmp_path, epochs=30, kills=2)


@pytest.mark.slow
def test_killed_twenty_times(noctule_command, tmp_path):
    kill_and_resume(noctule_command, tmp_path, epochs=250, kills=20)


def test_ctrl_c_leaves_a_checkpoint_and_the_command_to_go_on(noctule_command, tmp_path):
    process = noctule_command("run", "sparse_mlp", *OPTIONS, "--epochs", 2000, "--compare", "none", "--out", "run")
    deadline = time.monotonic() + 60
    while not files(tmp_path / "run"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    assert files(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").exists()
