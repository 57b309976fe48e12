"""`noctule shrink` takes a run, a shipped name or a function of a file, and says in one line what is wrong."""

import json
from pathlib import Path

import pytest
import torch

from noctule.cli.main import main
from noctule.cli.predictions import predict
from noctule.data import load
from noctule.shrinking import of_name

FILE = """
from torch import nn
def of_images(shape, classes):
    assert shape == (1, 8, 8)
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, classes))
def of_rows(features, classes):
    return nn.Linear(features, classes)
def wrong(features, classes):
    return nn.Linear(features, 3)
def broken(features, classes):
    raise KeyError("width")
def number(features, classes):
    return 3
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def shrink(model: object, *words: str, data: str = "digits", target: str = "bytes=2x") -> int:
    return main(
        ["shrink", str(model), "--data", data, "--target", target, "--teacher-epochs", "1", "--epochs", "1", *words]
    )


@pytest.mark.parametrize(
    ("model", "words", "text"),
    [
        ("resnett", {}, "did you mean resnet"),
        ("resnet", {"data": "digitz"}, "did you mean 'digits'"),
        ("mlp", {"target": "byte=10x"}, "did you mean bytes"),
        ("mlp", {"target": "latency=fast"}, "say latency=3x"),
    ],
)
def test_unknown_words_get_one_line(model, words, text, capsys, tmp_path):
    assert shrink(model, "--out", str(tmp_path / "out"), **words) == 2
    error = capsys.readouterr().err.strip()
    assert text in error
    assert error.count("\n") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("absent", "has no function absent"),
        ("wrong", r"gives (2, 3) for 2 samples of 10 classes"),
        ("broken", "KeyError"),
        ("number", "returned int"),
    ],
)
def test_a_function_that_makes_no_model_is_refused(function, text, file, capsys, tmp_path):
    assert shrink(f"{file}:{function}", "--out", str(tmp_path / "out")) == 2
    assert text in capsys.readouterr().err


def test_a_function_gets_the_shape_of_images_or_the_number_of_features(file, capsys, tmp_path):
    assert shrink(f"{file}:of_images", "--out", str(tmp_path / "a"), "--only", "source-int8") == 0
    assert (tmp_path / "a" / "source-int8.noctule").exists()
    assert capsys.readouterr().out.startswith("source-int8: ")
    assert shrink(f"{file}:of_rows", "--out", str(tmp_path / "a"), "--only", "source-int8") == 2
    assert "is of another command: model was" in capsys.readouterr().err


def test_a_finished_run_is_a_source_with_the_data_of_its_training(tmp_path, capsys):
    run = str(tmp_path / "run")
    small = ["--hidden", "12", "--epochs", "1", "--density", "0.5", "--threads", "1", "--compare", "none"]
    assert main(["run", "sparse_mlp", "--data", "digits", *small, "--out", run]) == 0
    trained = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["validation_accuracy"]
    assert shrink(run, "--out", str(tmp_path / "out"), "--only", "source-float32") == 0
    line = json.loads((tmp_path / "out" / "candidates.jsonl").read_text())
    assert line["accuracy"] == pytest.approx(trained, abs=1e-6)
    assert predict(tmp_path / "out" / "source-float32.noctule", "digits").names == predict(run, "digits").names
    other = tmp_path / "other.csv"
    other.write_text("a,b,label\n" + "".join(f"{n},{n % 3},{n % 2}\n" for n in range(60)))
    assert shrink(run, "--out", str(tmp_path / "no"), data=str(other)) == 1
    assert "are not the data that" in capsys.readouterr().err


def test_numbers_to_predict_are_refused(tmp_path, capsys):
    table = tmp_path / "prices.csv"
    table.write_text("a,price\n" + "".join(f"{n},{n * 1.37:.3f}\n" for n in range(60)))
    assert shrink("mlp", "--out", str(tmp_path / "out"), data=str(table)) == 2
    assert "takes data with classes" in capsys.readouterr().err


def test_shipped_names_fit_their_data():
    for name in ("mlp", "sparse_mlp", "resnet"):
        source = of_name(name, "digits", data_dir=None, seed=0)
        assert source.sparse == (name == "sparse_mlp")
        assert source.model.eval()(load("digits").train.inputs[:2]).shape == (2, 10)
