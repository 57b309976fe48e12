"""`noctule run sparse_cnn`: what it leaves, what it refuses, and that augmentation and all go on where they stopped."""

import json
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from noctule import FuseEpilogue, RunFolder, ToSparse, convert_, evaluate, fit, gse, load_model, param_groups
from noctule.cli.main import main
from noctule.core.method import Method
from noctule.data import Batches, Dataset, load
from noctule.data.augment import cutout, flip, shift
from noctule.models import cnn
from noctule.report import Journal
from noctule.sparse.layers.keep_layout import KeepLayout

SMALL = ["--channels", "6", "8", "--density", "0.2", "--every", "3", "--threads", "1"]
AUGMENTED = ["--shift", "1", "--flip", "--cutout", "3"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cnn") / "run"
    assert main(["run", "sparse_cnn", *SMALL, *AUGMENTED, "--epochs", "2", "--out", str(folder)]) == 0
    return folder


def sparse(model: nn.Module, density: float = 0.2) -> nn.Module:
    for rule in (ToSparse(density=density), FuseEpilogue(), KeepLayout()):
        model = convert_(model, rule).model
    return model


def test_a_run_leaves_everything_it_promises(finished):
    assert {entry.name for entry in finished.iterdir()} >= {
        "metrics.jsonl",
        "model.safetensors",
        "model.json",
        "report.html",
    }
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["series"], r["epoch"]) for r in records] == [("sparse", 1), ("sparse", 2), ("dense", 1), ("dense", 2)]
    assert sum(layer["moved"] for layer in records[0]["layers"].values()) > 0
    series = json.loads((finished / "summary.json").read_text())["series"]
    assert series["sparse"]["parameters"] < series["dense"]["parameters"]


def test_multiply_adds_are_those_of_the_formula(finished):
    series = json.loads((finished / "summary.json").read_text())["series"]
    pixels = [64, 64, 16, 16, 1]
    dense = [9 * 6, 9 * 6 * 6, 9 * 6 * 8, 9 * 8 * 8, 80]
    weights = [layer["weights"] for layer in load_model(finished)[1]["layers"].values()]
    assert sum(weights) == round(0.2 * sum(dense))
    for name, layers in (("dense", dense), ("sparse", weights)):
        each = [p * n for p, n in zip(pixels, layers, strict=True)]
        assert series[name]["multiply_adds_per_sample"] == 3 * sum(each) - each[0]


def test_the_model_file_rebuilds_the_model(finished):
    state, structure = load_model(finished)
    options = {key: structure[key] for key in ("channels", "convolutions")}
    model = sparse(cnn(tuple(structure["shape"]), structure["classes"], **options))
    model.load_state_dict(state)
    outcome = json.loads((finished / "summary.json").read_text())["series"]["sparse"]
    assert evaluate(model, load("digits").test) == (outcome["test_loss"], outcome["test_accuracy"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--batch", "1"], "batch must be at least 2"),
        (["--epochs", "-1"], "epochs at least 0"),
        (["--batch", "100000"], "smaller batch_size"),
        (["--shift", "-1"], "at least 0 pixels"),
        (["--cutout", "-1"], "at least 0 pixels"),
        (["--density", "0"], "density must lie in"),
        (["--every", "0"], "every must be at least 1"),
        (["--dropout", "1"], "dropout must lie in"),
        (["--channels", "4", "4", "4", "4"], "cannot be halved 4 times"),
        (["--channels", "0"], "at least 1"),
        (["--convolutions", "0"], "at least 1"),
        (["--rewire", "often"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_is_status_2_with_a_remedy_and_no_trace(words, text, capsys, tmp_path):
    assert main(["run", "sparse_cnn", "--threads", "1", *words]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_table_is_refused(tmp_path, capsys):
    (tmp_path / "train.csv").write_text("\n".join(["a,b,label"] + [f"{i % 7},{i % 3},{i % 2}" for i in range(300)]))
    assert main(["run", "sparse_cnn", "--data", "train.csv", "--threads", "1"]) == 1
    assert "no images" in capsys.readouterr().err


class StopAt(Method):
    """Ctrl-C at a step, or never."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def after_step(self) -> None:
        self.seen += 1
        if self.seen == self.step:
            signal.raise_signal(signal.SIGINT)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    return cutout(flip(shift(images, generator, pixels=1), generator), generator, size=3)


@pytest.mark.parametrize("stop", [1, 6, 9])
def test_resumed_is_never_stopped(tmp_path, stop):
    images = Dataset(torch.randn(100, 8, 8), torch.arange(100) % 3, name="toy", classes=3)
    folder = RunFolder.create(tmp_path / "run", recipe="test", options={}, seed=0)

    def train(stop: int, journal: Journal | None) -> nn.Module:
        torch.manual_seed(1)
        model = sparse(cnn((1, 8, 8), 3, channels=[4, 6], dropout=0.2))
        optimizer = torch.optim.AdamW(param_groups(model), lr=0.01)
        batches = Batches(images, 16, seed=2, drop_last=True, augment=augment)
        methods = [gse(every=4), StopAt(stop)]
        fit(model, optimizer, batches, validation=images, epochs=2, methods=methods, journal=journal)
        return model

    whole = train(0, None)
    with pytest.raises(KeyboardInterrupt):
        train(stop, Journal(folder, "sparse"))
    resumed = train(0, Journal(folder, "sparse"))
    expected = dict(whole.named_parameters()) | dict(whole.named_buffers())
    for name, tensor in (dict(resumed.named_parameters()) | dict(resumed.named_buffers())).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_killed_and_resumed_is_never_killed(noctule_command, tmp_path):
    words = [
        "run",
        "sparse_cnn",
        *SMALL,
        *AUGMENTED,
        "--epochs",
        "12",
        "--compare",
        "none",
        "--checkpoint-seconds",
        "0.1",
    ]
    whole = noctule_command(*words, "--out", "whole")
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    torn = noctule_command(*words, "--out", "torn", killed=(4, "written"))
    _, err = torn.communicate(timeout=300)
    assert torn.returncode == -signal.SIGKILL, err
    again = noctule_command("run", "--resume", "torn")
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert (tmp_path / "torn" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert curves(tmp_path / "torn") == curves(tmp_path / "whole")


def curves(run: Path) -> list[tuple[object, ...]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["series"], r["epoch"], r["step"], r["validation_loss"], r["train_loss"]) for r in records]
