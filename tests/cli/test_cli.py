"""The command line, mostly in this process; the main job once as a person runs it."""

import json
import re
from pathlib import Path

import pytest
import torch

from noctule import load_model
from noctule.cli.main import main

SMALL = ["--hidden", "32", "32", "--epochs", "2", "--density", "0.2", "--threads", "1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["run", "sparse_mlp", *SMALL, "--every", "3", "--out", str(folder)]) == 0
    return folder


def test_a_run_leaves_everything_it_promises(finished):
    names = {entry.name for entry in finished.iterdir()}
    assert names >= {
        "run.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "model.safetensors",
        "model.json",
        "summary.json",
        "report.html",
    }
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["series"], r["epoch"]) for r in records] == [("sparse", 1), ("sparse", 2), ("dense", 1), ("dense", 2)]
    series = json.loads((finished / "summary.json").read_text())["series"]
    sparse, dense = series["sparse"], series["dense"]
    assert sparse["parameters"] < dense["parameters"]
    assert sparse["multiply_adds_per_sample"] < dense["multiply_adds_per_sample"]
    assert sparse["peak_memory_bytes"] > 0
    about = json.loads((finished / "run.json").read_text())
    assert about["options"]["hidden"] == [32, 32]
    assert about["threads"] == 1


def test_multiply_adds_are_those_of_the_formula(finished):
    series = json.loads((finished / "summary.json").read_text())["series"]
    widths = [64, 32, 32, 10]
    dense = [a * b for a, b in zip(widths, widths[1:])]
    assert series["dense"]["multiply_adds_per_sample"] == 3 * sum(dense) - dense[0]
    layers = load_model(finished)[1]["layers"]
    weights = [layer["weights"] for layer in layers.values()]
    assert sum(weights) == round(0.2 * sum(dense))
    assert series["sparse"]["multiply_adds_per_sample"] == 3 * sum(weights) - weights[0]


def test_the_model_file_rebuilds_the_model(finished):
    from noctule import FuseEpilogue, ToSparse, convert_, evaluate, mlp
    from noctule.data import load, standardize

    state, structure = load_model(finished)
    model = mlp(*structure["widths"], dropout=0.3)
    convert_(model, ToSparse(density=0.2))
    convert_(model, FuseEpilogue())
    model.load_state_dict(state)
    outcome = json.loads((finished / "summary.json").read_text())["series"]["sparse"]
    assert evaluate(model, standardize(load("digits")).test)[1] == outcome["test_accuracy"]


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    before = (finished / "model.safetensors").read_bytes()
    metrics = (finished / "metrics.jsonl").read_bytes()
    assert main(["run", "--resume", str(finished)]) == 0
    assert (finished / "model.safetensors").read_bytes() == before
    assert (finished / "metrics.jsonl").read_bytes() == metrics
    assert "report:" in capsys.readouterr().out


def test_compare_prints_both_series(finished, capsys):
    assert main(["compare", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "sparse" in out
    assert "dense" in out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["run", "sparse_mpl"], "did you mean sparse_mlp"),
        (["run", "sparse_mlp", "--epoch", "3"], "did you mean --epochs"),
        (["run", "sparse_mlp", "--epochs", "many"], "invalid int value"),
        (["run", "sparse_mlp", "--density", "0"], "density must lie in"),
        (["run", "sparse_mlp", "--density", "1.5"], "density must lie in"),
        (["run", "sparse_mlp", "--rewire", "often"], "invalid choice"),
        (["run", "sparse_mlp", "--dropout", "1"], "dropout must lie in"),
        (["run", "sparse_mlp", "--batch", "0"], "batch"),
        (["run", "sparse_mlp", "--epochs", "-1"], "epochs"),
        (["run", "sparse_mlp", "--data", "digts"], "digits"),
        (["run", "sparse_mlp", "--hidden", "0"], "hidden widths"),
        (["run", "sparse_mlp", "--threads", "0"], "at least 1"),
        (["run", "mine.py"], "no file mine.py"),
        (["run"], "say which recipe"),
        (["run", "--resume", "nowhere"], "not a run"),
        (["bench", "layer"], "did you mean layers"),
        (["rum"], "did you mean run"),
        (["compare"], "required"),
        (["data", "--what"], "no argument --what"),
    ],
)
def test_a_wrong_command_line_is_status_2_with_a_remedy_and_no_trace(words, text, capsys, tmp_path):
    assert main(words) == 2
    assert text in capsys.readouterr().err
    runs = tmp_path / "runs"
    assert not runs.exists() or not list(runs.iterdir())


def test_resume_refuses_another_recipe_and_other_options(finished, capsys):
    assert main(["run", "sparse_mlp", "--resume", str(finished), "--epochs", "9"]) == 2
    assert "leave out epochs" in capsys.readouterr().err


def test_a_run_folder_is_never_written_over(finished, capsys):
    assert main(["run", "sparse_mlp", *SMALL, "--out", str(finished)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_diverging_run_stops_with_status_1_and_says_how_to_go_on(tmp_path, capsys):
    assert main(["run", "sparse_mlp", *SMALL, "--learning-rate", "1e38", "--out", "run"]) == 1
    assert re.search(r"NaN|infinite|finite", capsys.readouterr().err)


def test_your_own_recipe(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def mine(run, *, times: int = 1):\n    '''My recipe.'''\n    run.log({'series': 'a', 'epoch': times, 'step': 1})\n"
    )
    assert main(["run", "mine.py", "--times", "3", "--out", "out"]) == 0
    assert '"epoch": 3' in (tmp_path / "out" / "metrics.jsonl").read_text().replace('":', '": ').replace(":  ", ": ")
    assert main(["run", "mine.py:other"]) == 2


def test_your_own_data(tmp_path):
    rows = ["a,b,label"] + [f"{i % 7},{i % 3},{'x' if i % 7 > 3 else 'y'}" for i in range(300)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("\n".join(rows))
    assert main(["run", "sparse_mlp", *SMALL, "--data", "data", "--compare", "none", "--out", "out"]) == 0


def test_listings(capsys):
    for words, text in (
        (["recipes"], "sparse_mlp"),
        (["data"], "digits"),
        (["data", "digits"], "64 features, 10 classes"),
        (["doctor"], "compiled kernels"),
        (["--help"], "doctor"),
        (["run", "--help"], "sparse_mlp"),
        (["--version"], "noctule"),
    ):
        assert main(words) == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize("words", [["run", "sparse_mlp", "--help"], ["compare", "--help"], ["data", "--help"]])
def test_help_of_a_command(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    assert "usage: noctule" in capsys.readouterr().out


def test_a_file_in_the_way(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/run"):
        assert main(["run", "sparse_mlp", "--epochs", "0", "--out", out]) == 2
        assert "noctule: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
