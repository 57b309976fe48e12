"""Each strategy of the list trains two workers from the command line; real processes."""

import json
import os
import signal
import time

import pytest

from forked import workers_of
from noctule.team.strategies import names

TINY = "--hidden 16 --density 0.3 --every 5 --batch 256 --dropout 0 --learning-rate 0.01 --compare none --threads 1".split()
OWN = {
    "sync": ["--per-machine", 2, "--codec", "natural"],
    "diloco": ["--meet", 5, "--fragments", 2, "--overlap", 2, "--codec", "natural"],
    "local": ["--meet", 5, "--codec", "bf16"],
    "ssp": ["--bound", 2, "--server-rate", 0.05],
    "wasap": ["--server-rate", 0.02],
    "gossip": ["--meet", 2],
}
"""Options of some."""
ELSEWHERE = ("ssp", "wasap")
"""Strategies that train in `test_launch_together` whenever the tests are run."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ELSEWHERE)) for name in names()]
)
def test_it_trains_two_workers(noctule_command, tmp_path, name):
    words = ["--strategy", name, *OWN.get(name, [])]
    process = noctule_command("run", "sparse_mlp", *TINY, "--epochs", 4, "--workers", 2, *words, "--out", "run")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["together"]["workers"] == 2
    for folder in (tmp_path / "run", tmp_path / "run" / "workers" / "1"):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["epoch"] for record in records] == [1, 2, 3, 4]
        assert records[-1]["together"]["sent_bytes"] > 0
        assert records[-1]["validation_loss"] < 2.2
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--strategy", "gossip", "--meet", 2],
        ["--strategy", "diloco", "--meet", 6, "--fragments", 2, "--overlap", 2],
        ["--per-machine", 2],
        ["--strategy", "sandblaster"],
    ],
    ids=lambda words: words[1] if "--strategy" in words else "two levels",
)
def test_a_worker_that_is_killed_comes_back(noctule_command, tmp_path, words):
    options = ["--workers", 3, "--epochs", 10000, "--checkpoint-seconds", 1]
    process = noctule_command("run", "sparse_mlp", *TINY, *options, *words, "--out", "run")

    def records() -> list[dict]:
        path = tmp_path / "run" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(condition) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    until(lambda: len(records()) > 2)
    os.kill(workers_of(tmp_path)[-1], signal.SIGKILL)
    before = len(records())
    again = tmp_path / "run" / "workers" / "2" / "metrics.jsonl"
    was = again.stat().st_mtime_ns
    until(lambda: again.stat().st_mtime_ns > was and len(records()) > before + 2)
    until(lambda: records()[-1]["together"]["workers"] == 3)
    epochs = [record["epoch"] for record in records()]
    assert epochs == list(range(1, len(epochs) + 1))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert err.count("was ended by SIGKILL") == 1
