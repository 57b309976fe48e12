"""A parameter server of the command line, and workers with tickets, on machines of their own; real processes."""

import json
import signal
import stat
import subprocess
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from noctule.cli.main import main
from noctule.cli.serving import server_ticket
from noctule.core.errors import ExchangeError
from noctule.launch.server_ticket import ServerTicket
from noctule.team.serving import Serving
from noctule.team.strategies import made
from noctule.testing.link import available, shaped_network
from noctule.transport.reach import check_ticket
from noctule.transport.sockets import new_pair
from noctule.transport.ticket import Ticket

TRAIN = [
    *("run", "sparse_mlp", "--hidden", "64", "64", "--density", "0.2", "--rewire", "none", "--dropout", "0"),
    *("--batch", "64", "--compare", "none", "--checkpoint-seconds", "0.2"),
]


@pytest.fixture
def listening(tmp_path):
    """A server with a folder, in this process, and the ticket of worker 0 out of two."""
    serving = Serving.made({"workers": 2})
    with closing(serving.strategy.serve(workers=2, folder=tmp_path / "server")) as server:
        yield server, server_ticket(serving, server.ticket(0))


def epochs(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["epoch"] for line in path.read_text().splitlines()] if path.exists() else []


def until(condition, *processes: subprocess.Popen[str], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def until_said(process: subprocess.Popen[str], words: str) -> list[str]:
    assert process.stdout is not None
    said = []
    while words not in "".join(said):
        said.append(process.stdout.readline())
        assert said[-1], process.communicate()
    return said


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=180.0)
    assert process.returncode == code, out + err
    return out + err


@pytest.mark.slow
@pytest.mark.skipif(bool(available()), reason=str(available()))
def test_machines_of_their_own_go_on_when_the_server_or_a_worker_is_killed(noctule_command, tmp_path):
    said = []
    with shaped_network(2) as network:
        first, second = network.command(0), network.command(1)
        options = ["--workers", 2, "--host", "0.0.0.0", "--public-host", network.addresses[0], "--port", 5600]
        server = noctule_command("server", "server", *options, "--server-rate", 0.05, "--shards", 2, place=first)
        until(lambda: (tmp_path / "server" / "worker-1.ticket").exists(), server)
        here = noctule_command(
            *TRAIN, "--epochs", 30, "--ticket", "server/worker-0.ticket", "--out", "here", place=first
        )
        said += until_said(server, "worker 0 takes part")

        server.kill()  # worker 0 waits for worker 1
        said.append(finished(server, -signal.SIGKILL))
        server = noctule_command("server", "server", place=first)
        (tmp_path / "server" / "worker-1.ticket").rename(tmp_path / "carried")
        train = [*TRAIN, "--epochs", 30, "--ticket", "carried", "--out", "there"]
        there = noctule_command(*train, place=second)
        until(lambda: len(epochs(tmp_path / "there")) > 3, server, here, there)

        server.kill()  # both train
        said.append(finished(server, -signal.SIGKILL))
        before = len(epochs(tmp_path / "here"))
        server = noctule_command("server", "server", place=first)
        until(lambda: len(epochs(tmp_path / "here")) > before + 3, server, here, there)

        there.kill()
        said += [finished(there, -signal.SIGKILL), finished(here)]
        there = noctule_command(*train, place=second)  # a run that is there goes on
        said.append(finished(there))
        server.send_signal(signal.SIGTERM)
        said.append(finished(server, 143))

    assert epochs(tmp_path / "here") == epochs(tmp_path / "there") == list(range(1, 31))
    assert "tcp://10.77.0.1:5600, tcp://10.77.0.1:5601" in "".join(said)
    assert f"to go on: noctule server {tmp_path / 'server'}" in said[-1]
    assert "worker 0 has left" in said[-1]
    accuracy = json.loads((tmp_path / "here" / "summary.json").read_text())["series"]["sparse"]["test_accuracy"]
    assert accuracy > 0.85
    told = "".join(said) + "".join(
        path.read_text(errors="replace")
        for run in ("here", "there")
        for path in (tmp_path / run).rglob("*")
        if path.is_file()
    )
    keys = json.loads((tmp_path / "server" / "keys.json").read_text())
    for pair in [keys["server"], *keys["workers"].values()]:
        assert pair[1] not in told


def test_a_ticket_of_another_model_is_refused_and_the_server_serves_on(noctule_command, listening, tmp_path, capsys):
    server, _ = listening
    serving = Serving.made({"workers": 2})
    for worker in range(2):
        server_ticket(serving, server.ticket(worker)).save(tmp_path / f"{worker}.ticket")
    first = noctule_command(*TRAIN, "--epochs", 3, "--ticket", "0.ticket", "--out", "first")
    until(lambda: server.shards[0].parameters, first)
    train = [*TRAIN, "--epochs", "3", "--ticket", str(tmp_path / "1.ticket")]
    assert main([*train, "--hidden", "32", "--out", str(tmp_path / "other")]) == 1
    assert "refuses: worker 1 differs from the server in" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main([*train, "--out", str(tmp_path / "second")]) == 0
    finished(first)
    assert server.versions[0] > 0


# Tickets that do not fit.


def test_a_ticket_that_the_server_does_not_know_is_refused_at_once(listening, tmp_path, capsys):
    _, own = listening
    check_ticket(own.ticket)
    public, secret = (key.decode() for key in new_pair())
    stranger = replace(own.ticket, public_key=public, secret_key=secret)
    began = time.monotonic()
    with pytest.raises(ExchangeError, match="does not know the ticket of worker 0"):
        check_ticket(stranger)
    assert time.monotonic() - began < 5.0
    replace(own, ticket=stranger).save(tmp_path / "stranger.ticket")
    assert main([*TRAIN, "--ticket", str(tmp_path / "stranger.ticket"), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert "does not know the ticket" in said.err
    assert secret not in said.out + said.err
    assert not (tmp_path / "run").exists()


def test_a_ticket_of_another_server_is_refused_at_once(listening):
    _, own = listening
    with pytest.raises(ExchangeError, match="is not the server that gave the ticket of worker 0"):
        check_ticket(replace(own.ticket, server_key=new_pair()[0].decode()))


def test_nobody_is_waited_for_in_vain(listening):
    server, own = listening
    server.close()
    with pytest.raises(ExchangeError, match=r"no answer from tcp://127\.0\.0\.1:"):
        check_ticket(own.ticket, timeout_seconds=0.3)


def test_a_server_ticket_is_a_secret_file_that_is_also_a_ticket(listening, tmp_path):
    _, own = listening
    path = tmp_path / "worker.ticket"
    own.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ServerTicket.load(path) == own
    assert Ticket.load(path) == own.ticket
    assert own.ticket.secret_key not in f"{own} {own!r}"
    own.ticket.save(path)
    with pytest.raises(ValueError, match="does not say how many workers"):
        ServerTicket.load(path)
    for change, text in (
        ({"strategy": "sink"}, "there is no strategy sink"),
        ({"strategy": "ssp", "codec": "natrual"}, "did you mean natural"),
        ({"bound": 3}, "downpour has no --bound"),
        ({"strategy": "wasap"}, "does not serve"),
    ):
        own.save(path)
        facts = json.loads(path.read_text())
        path.write_text(json.dumps(facts | {"strategy": facts["strategy"] | change}))
        with pytest.raises(ValueError, match=text):
            ServerTicket.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no ticket"):
        ServerTicket.load(path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--strategy", "ssp"], "not with --strategy ssp"),
        (["--workers", "3"], "not with --workers 3"),
        (["--resume", "run"], "--ticket is for a worker by itself"),
    ],
)
def test_a_ticket_says_how_its_worker_trains(listening, tmp_path, capsys, monkeypatch, words, text):
    _, own = listening
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run", "run.json").write_text('{"recipe": "sparse_mlp", "options": {}}')
    own.save(Path("worker.ticket"))
    assert main(["run", "sparse_mlp", "--ticket", "worker.ticket", *words]) == 2
    assert text in capsys.readouterr().err


def test_a_recipe_that_knows_of_no_workers_says_so(listening, tmp_path, capsys):
    _, own = listening
    (tmp_path / "own.py").write_text("def own(run, *, seed: int = 0):\n    pass\n")
    own.save(tmp_path / "worker.ticket")
    words = ["run", str(tmp_path / "own.py"), "--ticket", str(tmp_path / "worker.ticket"), "--out", str(tmp_path / "r")]
    assert main(words) == 2
    assert "does not ask noctule.team.member()" in capsys.readouterr().err


def test_a_finished_run_needs_no_server(tmp_path, capsys):
    serving, words = (
        Serving.made({"workers": 1}),
        [*TRAIN, "--epochs", "1", "--ticket", str(tmp_path / "worker.ticket")],
    )
    with closing(serving.strategy.serve(workers=1)) as server:
        server_ticket(serving, server.ticket(0)).save(tmp_path / "worker.ticket")
        assert main([*words, "--out", str(tmp_path / "run")]) == 0
        assert server.versions[0] > 0
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main([*words, "--epochs", "2", "--out", str(tmp_path / "run")]) == 2
    assert "is another run" in capsys.readouterr().err


# Servers that cannot be.


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--workers says how many train"),
        (["--workers", "2", "--host", "0.0.0.0"], "0.0.0.0 is no address to connect to: say with --public-host"),
        (["--workers", "2", "--host", "nowhere.example"], "a network interface of this machine"),
        (["--workers", "2", "--public-host", "10.0.0.5:5555"], "without a port"),
        (["--workers", "2", "--port", "65535", "--shards", "2"], "2 ports from --port on"),
        (["--workers", "2", "--strategy", "wasap"], "does not serve wasap: bsp, downpour, ssp"),
        (["--workers", "2", "--strategy", "ssp", "--bound", "-1"], "bound is at least 0"),
        (["--workers", "2", "--bound", "1"], "downpour has no --bound: it is an option of ssp"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, capsys, words, text):
    assert main(["server", str(tmp_path / "server"), *words]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "server").exists()


def test_a_folder_is_of_one_server(tmp_path, capsys):
    from noctule.cli.serving import settle

    first = settle(tmp_path / "server", {"workers": 2, "strategy": "ssp", "port": 5601})
    assert settle(tmp_path / "server", {}) == first
    assert settle(tmp_path / "server", {"workers": 2}) == first
    assert main(["server", str(tmp_path / "server"), "--workers", "3", "--strategy", "bsp"]) == 2
    assert "of a server with another --workers and another --strategy" in capsys.readouterr().err


def test_a_server_is_reached_under_its_public_name(tmp_path):
    serving = Serving.made({"workers": 1, "host": "0.0.0.0", "public_host": "localhost", "shards": 2})
    assert serving.strategy == made({"strategy": "downpour", "meet": 1, "shards": 2})
    with closing(serving.strategy.serve(folder=tmp_path / "server", workers=1, host="0.0.0.0")) as server:
        ticket = server_ticket(serving, server.ticket(0)).ticket
        assert [address.rpartition(":")[0] for address in ticket.addresses] == ["tcp://localhost"] * 2
        check_ticket(ticket)
