"""The command line as jobs run it: signals, folders, terminals and disks of all kinds; real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from forked import workers_of

TRAIN = [*("run", "sparse_mlp", "--hidden", "32", "--batch", "64", "--compare", "none", "--threads", "1")]
SLEEPY = """
import signal, time
from noctule.train.interrupt import deferred_interrupt

def sleepy(run, *, held: bool = False):
    '''Load data for a minute.'''
    if held:
        with deferred_interrupt() as interrupted:
            print("loading", flush=True)
            while not interrupted():
                time.sleep(0.01)
            print("asked", flush=True)
            time.sleep(60)
    print("loading", flush=True)
    time.sleep(60)
"""


def epochs(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def until(condition, process: subprocess.Popen[str], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(process: subprocess.Popen[str], status: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=180)
    assert process.returncode == status, err
    assert "Traceback" not in err
    return out, err


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.fixture
def shell(tmp_path):
    def run(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A line of a shell script, in which $N is ``noctule``."""
        words = f"N='{sys.executable} -m noctule.cli'; {line}"
        return subprocess.run(
            ["bash", "-c", words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_what_is_mistyped_is_answered_without_torch(tmp_path):
    """All in one process: no command, recipe, option, value or path that is wrong makes it import torch."""
    (tmp_path / "mine.py").write_text("def other(run): ...\n")
    code = """
    import sys
    from noctule.cli.main import main
    for words, text in (
        ("run sparse_mpl", "did you mean sparse_mlp"),
        ("run mine", "did you mean mine.py"),
        ("run mni.py", "did you mean mine.py"),
        ("run mine.py", "it has other"),
        ("run sparse_mlp --epoch 3", "did you mean --epochs"),
        ("run sparse_mlp --epochs many", "invalid int value"),
        ("run sparse_cnn --rewire gze", "choose from"),
        ("run sparse_mlp --data digts", "did you mean digits"),
        ("run sparse_mlp --data nowhere/data.csv", "nowhere/data.csv"),
        ("run sparse_transformer --text nowhere.txt", "no file called 'nowhere.txt'"),
        ("run sparse_mlp --out=", "a path is empty"),
        ("run sparse_mlp --out mine.py", "is a file"),
        ("run sparse_mlp --workers 2 --meet 3", "sync has no --meet"),
        ("run sparse_mlp --workers 2 --strategy difoco", "did you mean diloco"),
        ("run sparse_mlp --workers 2 --codec natrual", "did you mean natural"),
        ("server x --workers 2 --bound 3", "downpour has no --bound"),
        ("run sparse_mlp --threads 0", "at least 1"),
        ("run --resume nowhere", "not a run"),
        ("server x --workers 0", "at least 1"),
        ("data digts", "did you mean digits"),
        ("compare nowhere", "not a run"),
    ):
        said = []
        sys.stderr = type("", (), {"write": lambda _, text: said.append(text), "flush": lambda _: None})()
        assert main(words.split()) == 2, words
        assert text in "".join(said), (words, said)
    sys.stderr = sys.__stderr__
    for words in ("--help", "recipes", "data", "run --help"):
        assert main(words.split()) == 0
    try:
        main(["run", "sparse_mlp", "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    loaded = {"torch", "numpy", "sklearn"} & set(sys.modules)
    assert not loaded, loaded
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "channels" not in done.stdout
    assert "--hidden" in done.stdout


@pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="under nohup, which is respected")
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on_anywhere(noctule_command, tmp_path, signum, status):
    words = [*TRAIN, "--epochs", 30, "--checkpoint-seconds", 1000]
    stopped = noctule_command(*words, "--out", "some/stopped")
    run = tmp_path / "some" / "stopped"
    until(lambda: epochs(run) > 2, stopped)
    stopped.send_signal(signum)
    out, err = ended(stopped, status)
    assert out.count("run: ") == 1
    assert err.count(f"stopped; to go on: noctule run --resume {run}") == 1
    assert (run / "report.html").exists()
    assert epochs(run) < 30
    if signum == signal.SIGHUP:
        return
    shutil.move(run, tmp_path / "moved")
    ended(noctule_command("run", "--resume", tmp_path / "moved"), 0)
    ended(noctule_command(*words, "--out", "whole"), 0)
    models = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("moved", "whole")]
    assert models[0] == models[1]


@pytest.mark.parametrize(
    "strategy",
    [
        ("--codec", "bf16"),
        pytest.param(("--strategy", "diloco", "--meet", 3), marks=pytest.mark.slow),
        pytest.param(("--strategy", "downpour"), marks=pytest.mark.slow),
        pytest.param(("--strategy", "wasap"), marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_all_processes_of_a_job_stops_workers_once(noctule_command, tmp_path, strategy):
    """As Slurm and systemd send it: to the supervisor, to the process that it forks workers from, and to each worker."""
    process = noctule_command(*TRAIN, "--epochs", 1000, "--workers", 2, *strategy, "--out", "run")
    run = tmp_path / "run"
    until(lambda: epochs(run) > 2, process)
    workers = [*children(process), *workers_of(tmp_path)]
    assert len(workers) >= 3
    for pid in (process.pid, *workers):
        os.kill(pid, signal.SIGTERM)
    _, err = ended(process, 143)
    assert err.count("stopped; to go on") == 1
    assert "was ended by" not in err
    assert {path.parents[2].name for path in run.rglob("checkpoints/sparse/*.safetensors")} == {"run", "1"}
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    before = epochs(run)
    again = noctule_command("run", "--resume", "run")
    until(lambda: epochs(run) > before, again)
    again.send_signal(signal.SIGINT)
    ended(again, 130)


@pytest.mark.parametrize("workers", [(), ("--workers", 2)])
def test_a_signal_before_anything_is_trained_leaves_no_run(noctule_command, tmp_path, workers):
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    process = noctule_command("run", "sleepy.py", *workers, "--out", "run")
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = ended(process, 143)
    assert time.monotonic() - began < 30
    assert "nothing" in err or "anything" in err
    assert not (tmp_path / "run").exists()
    assert "run:" not in out


def test_a_second_signal_ends_at_once(noctule_command, tmp_path):
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    process = noctule_command("run", "sleepy.py", "--held", "--out", "run")
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    ended(process, 143)


def test_a_server_ends_by_a_signal(noctule_command, tmp_path):
    pytest.importorskip("zmq")
    server = noctule_command("server", "server", "--workers", 1)
    assert server.stdout is not None
    assert server.stdout.readline().startswith("server: ")
    server.send_signal(signal.SIGTERM)
    _, err = ended(server, 143)
    assert "to go on: noctule server" in err
    assert (tmp_path / "server" / "worker-0.ticket").exists()


LIBRARY = """
import os, signal, sys, threading
import torch
from noctule import Checkpoints, Dataset, Batches, fit, mlp

class Journal:
    checkpoints = Checkpoints("kept")
    def rewind(self, epoch): ...
    def log(self, record):
        if record["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

heard = []
if sys.argv[1] == "own":
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
data = Dataset(torch.randn(32, 4), torch.arange(32) % 2, name="some", classes=2)
model = mlp(4, 8, 2)
fit(model, torch.optim.SGD(model.parameters(), lr=0.1), Batches(data, 8, seed=0), validation=data, epochs=4, journal=Journal())
assert before == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
print("heard", len(heard))
"""


@pytest.mark.parametrize("whose", ["own", "nobody's"])
def test_in_a_process_of_the_users_a_signal_does_what_it_did_but_after_a_checkpoint(tmp_path, whose):
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, whose], cwd=tmp_path, capture_output=True, text=True, timeout=180
    )
    assert "Traceback" not in done.stderr
    if whose == "own":
        assert (done.returncode, done.stdout) == (0, "heard 1\n")
    else:
        assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
        steps = {path.name for path in (tmp_path / "kept").iterdir()}
        assert "step-000000000009.safetensors" in steps  # the first step after the signal


RECIPE = """
import helpers_of_mine

def my_recipe(run, *, times: int = 1, where: str = ""):
    '''Mine.'''
    import late_helper
    run.log({"series": "a", "epoch": helpers_of_mine.ONE + late_helper.ONE, "step": times})
"""


def test_a_recipe_imports_its_neighbours_and_is_found_again_from_anywhere(shell, noctule_command, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("helpers_of_mine", "late_helper"):
        (project / f"{name}.py").write_text("ONE = 1\n")
    (project / "my_recipe.py").write_text(RECIPE)
    console = "-P -c 'import sys; from noctule.cli.main import main; sys.exit(main())'"
    done = shell(f"cd project && {sys.executable} {console} run my_recipe.py --out runs/a")
    assert done.returncode == 0, done.stderr
    assert json.loads((project / "runs" / "a" / "metrics.jsonl").read_text())["epoch"] == 2
    project.rename(tmp_path / "elsewhere")
    ended(noctule_command("run", "--resume", "elsewhere/runs/a"), 0)
    assert epochs(tmp_path / "elsewhere" / "runs" / "a") == 2


def test_what_a_recipe_imported_is_gone_after_its_run(tmp_path, monkeypatch):
    from noctule.cli.main import main

    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    for folder, value in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helpers_of_mine.py").write_text(f"ONE = {value}\n")
        (tmp_path / folder / "random.py").write_text(RECIPE.replace("late_helper", "helpers_of_mine"))
        assert main(["run", f"{folder}/random.py:my_recipe", "--out", f"{folder}/run"]) == 0
        assert json.loads((tmp_path / folder / "run" / "metrics.jsonl").read_text())["epoch"] == 2 * value
    assert sys.path == before
    assert "helpers_of_mine" not in sys.modules
    import random

    assert random.random() < 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [("import no_such_module\n", "line 1"), ("x = (\n", "is not Python"), ("x = 1\nx.y\n", "line 2")],
)
def test_a_recipe_that_cannot_be_imported_says_where(tmp_path, monkeypatch, capsys, text, said):
    from noctule.cli.main import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(text)
    assert main(["run", "mine.py"]) == 2
    assert said in capsys.readouterr().err


def test_paths_in_options_hold_from_any_folder(tmp_path, monkeypatch, capsys):
    from noctule.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.csv").write_text("a,b,label\n" + "".join(f"{i % 7},{i % 3},{i % 2}\n" for i in range(90)))
    assert main([*TRAIN, "--epochs", "1", "--data", "own.csv", "--data-dir", "~", "--out", "~/run"]) == 0
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["options"]["data"] == str(tmp_path / "own.csv")
    assert about["options"]["data_dir"] == str(tmp_path)
    monkeypatch.chdir("/")
    assert main(["run", "--resume", str(tmp_path / "run"), "--data", str(tmp_path / "own.csv")]) == 0
    capsys.readouterr()


def test_a_refused_run_is_not_announced(tmp_path, monkeypatch, capsys):
    from noctule.cli.main import main

    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, "--density", "3", "--out", "run"]) == 2
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_names_outside_ascii_are_printed_escaped(shell, tmp_path):
    ascii_only = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C"}
    done = shell(f"$N {' '.join(TRAIN)} --epochs 1 --out läufe/ß", **ascii_only)
    assert done.returncode == 0, done.stderr
    assert "\\xdf" in done.stdout
    assert done.stdout.isascii()
    assert (tmp_path / "läufe" / "ß" / "model.safetensors").exists()
    bare = shell("$N compare läufe/ß", **ascii_only, PYTHONCOERCECLOCALE="0")
    assert bare.returncode == 0, bare.stderr
    assert bare.stdout.isascii()


def test_a_reader_that_has_gone_and_a_full_disk_do_not_end_a_run(shell, tmp_path):
    done = shell(f"$N {' '.join(TRAIN)} --epochs 2 --out run | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr.count("rror")) == (0, 0), done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
    done = shell("$N recipes | true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (0, "")
    done = shell("$N recipes > /dev/full")
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = shell("$N recipes 2>&- >&-")
    assert done.returncode == 0


def test_two_runs_in_one_second_get_two_folders(noctule_command, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(run):\n    run.log({'series': 'a', 'epoch': 1, 'step': 1})\n")
    together = [noctule_command("run", "mine.py") for _ in range(2)]
    for process in together:
        ended(process, 0)
    made = list((tmp_path / "runs").iterdir())
    assert len(made) == 2
    assert [epochs(run) for run in made] == [1, 1]
    same = [noctule_command("run", "mine.py", "--out", "same") for _ in range(2)]
    for process in same:
        process.communicate(timeout=180)
    assert sorted(process.returncode for process in same) == [0, 2]
    assert epochs(tmp_path / "same") == 1


def test_the_same_second_gives_other_names(tmp_path):
    from noctule.report import RunFolder

    made = [RunFolder.create_in(tmp_path, "run", recipe="r", options={}, seed=0) for _ in range(3)]
    assert [run.path.name for run in made] == ["run", "run-2", "run-3"]


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root, to be someone else")
def test_a_folder_of_another_user_is_refused_before_training(shell, noctule_command):
    with tempfile.TemporaryDirectory() as place:  # pytest's own is closed to others
        os.chmod(place, 0o755)

        def train(name: str) -> None:
            ended(noctule_command(*TRAIN, "--epochs", 1, "--out", f"{place}/{name}"), 0)

        _refused_to_nobody(lambda line: shell(f"cd {place} && {line}"), train)


def _refused_to_nobody(shell, train) -> None:
    nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    if shell(f"{nobody} $N --version").returncode:
        pytest.skip("other users do not reach this Python")
    train("run")
    for words in ("--out mine/run", ""):
        done = shell(f"{nobody} $N {' '.join(TRAIN)} {words}")
        assert done.returncode == 2, done.stderr
        assert "with --out" in done.stderr
        assert "Traceback" not in done.stderr
    done = shell(f"{nobody} $N run --resume run")
    assert done.returncode == 2
    assert "cannot be written by this user" in done.stderr


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="needs root, to mount a small disk")
def test_a_disk_that_fills_inside_a_checkpoint_leaves_the_one_before(shell, noctule_command, tmp_path):
    """Of 512 KiB one checkpoint takes more than half: the second one breaks off between two tensors."""
    words = f"{' '.join(TRAIN)} --hidden 96 96 --density 1 --epochs 3 --out disk/run"
    (tmp_path / "job").write_text(
        f"mount -t tmpfs -o size=512k none disk; {sys.executable} -m noctule.cli {words}; echo $? > status; cp -r disk/run kept"
    )
    done = shell("mkdir disk; unshare -m bash job")
    assert (tmp_path / "status").read_text() == "1\n", done.stderr
    assert "No space left" in done.stderr
    assert "could not save" in done.stderr
    assert "free some space or choose another disk" in done.stderr
    assert "Traceback" not in done.stderr
    names = [path.name for path in (tmp_path / "kept" / "checkpoints" / "sparse").iterdir()]
    assert names == ["step-000000000020.safetensors"]
    ended(noctule_command("run", "--resume", "kept"), 0)
    assert epochs(tmp_path / "kept") == 3


def test_a_clock_that_jumps_back_changes_nothing(tmp_path):
    code = """
    import sys, time, datetime
    now = iter(range(2_000_000_000, 0, -3600))
    time.time = lambda: float(next(now))
    from noctule.cli.main import main
    sys.exit(main([*sys.argv[1:]]))
    """
    words = [*TRAIN, "--epochs", "4", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *words], cwd=tmp_path, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
