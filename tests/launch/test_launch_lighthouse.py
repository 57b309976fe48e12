"""Workers that meet at a lighthouse of torchft: who is lost is left out, who comes is taken in; real processes and lighthouses."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from noctule.checkpoint import load
from noctule.cli.main import main
from noctule.core.errors import UsageError
from noctule.launch.lighthouse import Lighthouse
from noctule.team.group import GroupTeam
from noctule.team.strategies import made
from noctule.testing.processes import Workers

os.environ.setdefault("RUST_LOG", "error")  # torchft tells of every quorum, and reads this when it is imported
coordination = pytest.importorskip("torchft.coordination", reason="needs torchft: pip install torchft-nightly")


class Light:
    """A lighthouse in this process."""

    def __init__(self, workers: int) -> None:
        self._server = coordination.LighthouseServer(
            bind="127.0.0.1:0", min_replicas=workers, join_timeout_ms=1000, heartbeat_timeout_ms=2000
        )
        self.address = "127.0.0.1:" + self._server.address().rpartition(":")[2]

    def out(self) -> None:
        self._server.shutdown()
        del self._server  # and the connections that there are


@pytest.fixture
def light() -> Light:
    return Light(2)


def exchange_until(rank: int, workers: int, address: str, member: int, flag: str) -> list[int]:
    """Exchange until there is a file, and say among how many workers that was, one after the other."""
    told, seen = Path(f"{flag}-{rank}"), []
    with Lighthouse(address, member=member, timeout_seconds=3.0) as rendezvous:
        team = GroupTeam(rendezvous, member=member, strategy=made({}))

        def training() -> list[int]:
            while True:
                (mean,) = team.exchange([torch.tensor([float(member), float(Path(flag).exists())])], ["x"])
                seen[:] = seen if seen[-1:] == [team.world] else [*seen, team.world]
                told.write_text(json.dumps([team.rank, *seen]))
                if mean[1] > 0.0:
                    return seen
                time.sleep(0.01)

        return team.train(training)


def until(
    condition: Callable[[], bool], seconds: float = 180.0, running: Sequence[subprocess.Popen[str]] = ()
) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        for process in running:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    return time.monotonic() - began


def told(flag: Path, rank: int) -> list[int]:
    path = Path(f"{flag}-{rank}")
    text = path.read_text() if path.exists() else ""
    return json.loads(text) if text else []


@pytest.mark.slow
def test_the_others_go_on_without_who_is_killed_and_take_in_who_comes(light, tmp_path):
    flag = tmp_path / "flag"
    with Workers(4, group=False) as processes:
        calls = {
            rank: processes.begin(exchange_until, light.address, rank, str(flag), ranks=[rank]) for rank in (2, 0, 1)
        }
        until(lambda: all(told(flag, rank)[-1:] == [3] for rank in range(3)))
        assert [told(flag, rank)[0] for rank in range(3)] == [0, 1, 2]  # in the order of their numbers
        processes.kill(0)  # at whose store they had met
        stall = until(lambda: all(told(flag, rank)[-1] == 2 for rank in (1, 2)))
        assert stall < 10.0
        comes = processes.begin(exchange_until, light.address, 0, str(flag), ranks=[3])
        until(lambda: all(told(flag, rank)[-1:] == [3] for rank in (1, 2, 3)))
        assert told(flag, 3) == [0, 3]
        flag.touch()
        assert comes.results() == [[3]]
        for rank in (1, 2):
            (worlds,) = calls[rank].results()
            assert worlds[-3:] == [3, 2, 3]


@pytest.mark.slow
def test_without_the_lighthouse_a_group_goes_on_but_there_is_no_new_one(light, tmp_path):
    flag = tmp_path / "flag"
    with Workers(3, group=False) as processes:
        call = processes.begin(exchange_until, light.address, 0, str(flag), ranks=[0])
        processes.begin(exchange_until, light.address, 1, str(flag), ranks=[1])
        until(lambda: all(told(flag, rank)[-1:] == [2] for rank in (0, 1)))
        light.out()
        time.sleep(3.0)  # longer than without a beat
        before = Path(f"{flag}-0").stat().st_mtime_ns
        until(lambda: Path(f"{flag}-0").stat().st_mtime_ns > before)
        processes.kill(1)
        began = time.monotonic()
        (error,) = call.outcomes(timeout_seconds=20.0)
        assert error.kind == "ExchangeError"
        assert "has not answered for" in error.message
        assert "torchft_lighthouse" in error.message
        assert time.monotonic() - began < 10.0


@pytest.mark.slow
def test_no_two_have_the_same_number(light, tmp_path):
    flag = tmp_path / "flag"
    with Workers(3, group=False) as processes:
        calls = [processes.begin(exchange_until, light.address, rank, str(flag), ranks=[rank]) for rank in (0, 1)]
        until(lambda: all(told(flag, rank)[-1:] == [2] for rank in (0, 1)))
        (error,) = processes.begin(exchange_until, light.address, 1, str(flag), ranks=[2]).outcomes()
        assert error.kind == "UsageError"
        assert "there is a worker 1" in error.message
        flag.touch()
        assert [call.results() for call in calls] == [[[2]], [[2]]]  # the others did not even notice


def test_what_cannot_be_reached_is_said_at_once(light):
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"no lighthouse at 127\.0\.0\.1:1 .*torchft_lighthouse"):
        Lighthouse("127.0.0.1:1", member=0)
    with pytest.raises(UsageError, match="machine:port, got here:there"):
        Lighthouse("here:there", member=0)
    with pytest.raises(UsageError, match="from 0 on, got member=-1"):
        Lighthouse(light.address, member=-1)
    assert time.monotonic() - began < 8.0


def test_without_torchft_the_error_says_what_to_install(light, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchft.coordination", None)
    with pytest.raises(UsageError, match=r"pip install 'noctule\[fault-tolerance\]'"):
        Lighthouse(light.address, member=0)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--lighthouse", "here:29510", "--out", "run"],
            "say --lighthouse MACHINE:PORT, --member INT and --out FOLDER",
        ),
        (["--member", "0", "--out", "run"], "say --lighthouse MACHINE:PORT, --member INT and --out FOLDER"),
        (
            ["--lighthouse", "here:29510", "--member", "0", "--out", "run", "--workers", "2"],
            "--workers is for the workers",
        ),
        (["--lighthouse", "here:29510", "--member", "0", "--out", "run", "--strategy", "ssp"], "--strategy ssp is for"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "sparse_mlp", *words]) == 2
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


OWN = """
import time
from pathlib import Path

import torch

from noctule import Batches, Method, ToSparse, convert_, fit, mlp, param_groups
from noctule.checkpoint import save
from noctule.data import load, standardize
from noctule.report import Journal
from noctule.sparse.rewire import anywhere
from noctule.team import team


class Pace(Method):
    def after_step(self):
        if not Path("hurry").exists():
            time.sleep(0.25)


def own(run, *, epochs: int = 40, seed: int = 0):
    splits = standardize(load("digits", seed=seed, validation_fraction=0.1))
    torch.manual_seed(seed)
    model = convert_(mlp(splits.train.features, 32, splits.train.classes), ToSparse(density=0.2)).model
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.005)
    batches = Batches(splits.train, 128, seed=seed)
    here, steps = team(), epochs * len(batches)
    methods = [*here.rewire(grow=anywhere, every=7, seed=seed), Pace(), *here.methods(steps=steps)]
    journal = here.journal(Journal(run, "sparse"), steps=steps)
    shared = here.share(batches)
    here.train(
        lambda: fit(model, optimizer, shared, validation=splits.validation, epochs=epochs, methods=methods, journal=journal)
    )
    save(run.path / "weights", dict(model.state_dict()))
"""


def records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_three_trainings_are_one_though_one_is_killed_and_another_comes(light, noctule_command, tmp_path, victim):
    (tmp_path / "own.py").write_text(OWN)

    def begin(member: int, name: str) -> subprocess.Popen[str]:
        return noctule_command("run", "own.py", "--lighthouse", light.address, "--member", member, "--out", name)

    def among(name: str) -> int:
        return ([0] + [record["together"]["workers"] for record in records(tmp_path / name)])[-1]

    runs = {name: begin(member, name) for member, name in enumerate("abc")}
    until(lambda: all(among(name) == 3 for name in "abc"), running=list(runs.values()))
    lost = "abc"[victim]
    runs.pop(lost).send_signal(signal.SIGKILL)
    left = list(runs)
    until(lambda: all(among(name) == 2 for name in left), running=list(runs.values()))
    runs["new"] = begin(victim, "new")
    until(lambda: among("new") == 3, running=list(runs.values()))
    (tmp_path / "hurry").touch()
    for name in [*left, "new"]:
        _, err = runs[name].communicate(timeout=120)
        assert runs[name].returncode == 0, err
    weights = [(tmp_path / name / "weights").read_bytes() for name in [*left, "new"]]
    assert weights[0] == weights[1] == weights[2]
    assert records(tmp_path / "new")[0]["epoch"] > 1  # it went on where the others were
    alone = noctule_command("run", "own.py", "--out", "alone")
    assert not alone.wait(120)
    for name in left:
        found, expected = (
            [record["validation_loss"] for record in records(tmp_path / folder)] for folder in (name, "alone")
        )
        assert found == pytest.approx(expected, abs=1e-5)
    mine, whole = (load(tmp_path / name / "weights") for name in ("new", "alone"))
    for key, x in whole.items():
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(mine[key], x, atol=1e-4, rtol=1e-4)
