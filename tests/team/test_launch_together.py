"""Several workers are one worker, whoever is killed meanwhile; real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forked import workers_of

OPTIONS = [
    *("--hidden", "64", "64", "--density", "0.2", "--every", "7", "--dropout", "0", "--batch", "128"),
    *("--compare", "none", "--checkpoint-seconds", "1000"),
]


def records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run: Path) -> list[float]:
    return [record["validation_loss"] for record in records(run)]


def until(condition, process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finished(process: subprocess.Popen[str], seconds: float = 180.0) -> str:
    _, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return err


def test_three_workers_are_one_and_go_on_when_any_is_killed(noctule_command, tmp_path):
    """Each comes back, and then they are three again; momentum SGD, since AdamW makes much of the last digits in time."""
    words = ["run", "sparse_mlp", *OPTIONS[:5], "--dropout", 0, "--batch", 64, "--compare", "none", "--original"]
    words += ["--every", 200, "--checkpoint-seconds", 1000, "--epochs", 10000]  # many moves tip on a last digit
    killed = noctule_command(*words, "--workers", 3, "--out", "killed")
    run = tmp_path / "killed"

    def until_workers(count: int, after: int) -> None:
        """Wait for a record of so many workers among those behind the first `after`."""
        until(lambda: any(r["together"]["workers"] == count for r in records(run)[after:]), killed)

    until(lambda: len(records(run)) > 2, killed)
    assert {record["together"]["workers"] for record in records(run)} == {3}
    os.kill(workers_of(tmp_path)[1], signal.SIGKILL)
    until_workers(3, len(records(run)) + 2)
    os.kill(workers_of(tmp_path)[0], signal.SIGKILL)  # which keeps the run's records
    before = len(records(run))
    until_workers(3, before + 2)
    killed.send_signal(signal.SIGINT)
    _, err = killed.communicate(timeout=60)
    assert killed.returncode == 130, err
    assert err.count("was ended by SIGKILL") == 2
    found = {record["epoch"]: record["validation_loss"] for record in records(run)}
    back, last = records(run)[before]["epoch"], records(run)[-1]["epoch"]
    assert [*found] == [*range(1, before + 1), *range(back, last + 1)]  # all epochs that the first worker was there for
    alone = noctule_command(*words, "--threads", 1, "--out", "alone")
    until(lambda: len(records(tmp_path / "alone")) >= last, alone)
    alone.send_signal(signal.SIGINT)
    alone.communicate(timeout=60)
    expected = losses(tmp_path / "alone")
    assert found == pytest.approx({epoch: expected[epoch - 1] for epoch in found}, abs=1e-5)
    together = records(run)[-1]["together"]
    assert together["sent_bytes"] > 0
    assert together["noise_scale"]["batch"] == 64
    assert together["noise_scale"]["measured"] > 0


@pytest.mark.parametrize("strategy", [("--codec", "topk"), ("--strategy", "diloco", "--meet", 3, "--every", 3)])
def test_ctrl_c_stops_all_at_one_step_and_resuming_is_never_having_stopped(noctule_command, tmp_path, strategy):
    words = ["run", "sparse_mlp", *OPTIONS, "--epochs", 14, "--workers", 2, *strategy]
    stopped = noctule_command(*words, "--out", "stopped")
    until(lambda: len(records(tmp_path / "stopped")) > 3, stopped)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, err
    assert "--resume" in err
    assert "noise_scale" not in records(tmp_path / "stopped")[-1]["together"]
    latest = {
        max(p.name for p in folder.glob("*.safetensors"))
        for folder in (tmp_path / "stopped").rglob("checkpoints/sparse")
    }
    assert len(latest) == 1
    assert len(records(tmp_path / "stopped")) < 14
    finished(noctule_command("run", "--resume", "stopped"))
    finished(noctule_command(*words, "--out", "whole"))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    states = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("stopped", "whole")]
    assert states[0] == states[1]


OWN = """
import os, signal, time
from noctule.team import team

def own(run, *, fail: str = "", seed: int = 0):
    if team().rank == 1 and fail == "raise":
        raise RuntimeError("no such sensor")
    if team().rank == 1 and fail == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60.0 if fail else 0.1)
"""


@pytest.mark.parametrize(
    ("fail", "text"),
    [
        ("", "does not ask noctule.team.member()"),
        ("raise", "worker 1: RuntimeError: no such sensor"),
        ("die", "worker 1 was ended by SIGKILL 4 times"),
    ],
)
def test_a_worker_that_fails_by_itself_ends_the_run(noctule_command, tmp_path, fail, text):
    (tmp_path / "own.py").write_text(OWN)
    process = noctule_command("run", "own.py", "--fail", fail, "--workers", 2, "--out", "run")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert text in err
    assert "Traceback" not in err.replace("worker.log", "")


def test_workers_that_compare_what_their_growers_saw_go_on_alike(noctule_command, tmp_path):
    """A worker that dies while connections move leaves the others between two steps: they take over from one of them."""
    process = noctule_command(
        "run", "sparse_mlp", *OPTIONS, "--batch", 64, "--every", 1, "--epochs", 12, "--workers", 2, "--out", "run"
    )
    for epoch in (2, 6):
        until(lambda at=epoch: len(records(tmp_path / "run")) > at, process)
        os.kill(workers_of(tmp_path)[1], signal.SIGKILL)
    assert finished(process).count("was ended by SIGKILL") == 2
    assert [record["epoch"] for record in records(tmp_path / "run")] == list(range(1, 13))
    assert records(tmp_path / "run")[-1]["validation_accuracy"] > 0.85
    assert (tmp_path / "run" / "report.html").exists()
    finished(noctule_command("run", "--resume", "run"))  # though there is nothing to do


def test_workers_of_a_parameter_server_and_the_server_may_be_killed(noctule_command, tmp_path):
    words = ["run", "sparse_mlp", *OPTIONS, "--epochs", 40, "--rewire", "none", "--strategy", "ssp", "--workers", 2]
    process = noctule_command(*words, "--server-rate", 0.05, "--out", "run", "--checkpoint-seconds", 0.2)
    until(lambda: len(records(tmp_path / "run")) > 3, process)
    server, _, second = workers_of(tmp_path)
    os.kill(server, signal.SIGKILL)
    until(lambda: len(records(tmp_path / "run")) > 12, process)
    os.kill(second, signal.SIGKILL)
    assert finished(process).count("was ended by SIGKILL") == 2
    found = records(tmp_path / "run")
    assert [record["epoch"] for record in found] == list(range(1, 41))
    assert found[-1]["validation_accuracy"] > 0.85
    assert sum(found[-1]["together"]["staleness"].values()) > 0
    assert len(records(tmp_path / "run" / "workers" / "1")) == 40


def test_wasap_ends_with_one_network_though_a_worker_was_killed(noctule_command, tmp_path):
    words = ["run", "sparse_mlp", *OPTIONS[:-2], "--original", "--epochs", 30, "--workers", 2, "--strategy", "wasap"]
    process = noctule_command(*words, "--server-rate", 0.02, "--out", "run", "--checkpoint-seconds", 0.2)
    until(lambda: len(records(tmp_path / "run")) > 8, process)
    os.kill(workers_of(tmp_path)[2], signal.SIGKILL)
    assert finished(process).count("was ended by SIGKILL") == 1
    mine, other = losses(tmp_path / "run"), losses(tmp_path / "run" / "workers" / "1")
    assert len(mine) == len(other) == 30
    assert mine[-1] == other[-1]
    assert mine[-2] != other[-2]
    assert records(tmp_path / "run")[-1]["validation_accuracy"] > 0.85


@pytest.mark.slow
def test_torchrun_starts_all_again_from_the_checkpoint(tmp_path):
    words = ["run", "sparse_mlp", *map(str, OPTIONS[:-1]), "0.2", "--epochs", "120", "--out", "run"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "3",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    process = subprocess.Popen(
        [*command, "-m", "noctule.cli", *words],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: len(records(tmp_path / "run")) > 5, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        finished(process)
    finally:
        process.kill()
    assert [record["epoch"] for record in records(tmp_path / "run")] == list(range(1, 121))
