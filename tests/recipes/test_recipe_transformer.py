"""`noctule run sparse_transformer`: what it leaves and says, what it refuses, and that it goes on where it stopped."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from noctule import FuseEpilogue, RunFolder, ToSparse, convert_, evaluate, fit, gse, load_model
from noctule.cli.main import main
from noctule.core.method import Method
from noctule.core.schedule import cosine
from noctule.data import Batches, read_text
from noctule.models import Transformer
from noctule.recipes.sparse_transformer import by_inputs
from noctule.report import Journal

SONG = "The bat sings at night, and sleeps by day; by day it hangs, at night it sings. " * 30
SIZES = ["--width", "16", "--depth", "1", "--heads", "2", "--context", "12"]
SMALL = [*SIZES, "--density", "0.3", "--every", "3", "--threads", "1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def song(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "song.txt"
    path.write_text(SONG)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, song) -> Path:
    folder = tmp_path_factory.mktemp("transformer") / "run"
    assert main(["run", "sparse_transformer", "--text", str(song), *SMALL, "--epochs", "2", "--out", str(folder)]) == 0
    return folder


def rebuilt(structure) -> nn.Module:
    model = Transformer(len(structure["vocabulary"]), **{key: structure[key] for key in ("width", "depth", "heads")})
    return convert_(convert_(model, ToSparse(density=0.3)).model, FuseEpilogue()).model


def test_a_run_leaves_everything_it_promises(finished):
    names = {entry.name for entry in finished.iterdir()}
    assert names >= {"metrics.jsonl", "model.safetensors", "model.json", "report.html"}
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["series"], r["epoch"]) for r in records] == [("sparse", 1), ("sparse", 2), ("dense", 1), ("dense", 2)]
    assert sum(layer["moved"] for layer in records[0]["layers"].values()) > 0
    assert all(0 < r["validation_loss"] < 2 * math.log(len(set(SONG))) for r in records)
    assert all(0 <= r["validation_accuracy"] <= 1 for r in records)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["data"]["name"] == "song"
    assert summary["data"]["classes"] == len(set(SONG))
    sparse, dense = summary["series"]["sparse"], summary["series"]["dense"]
    assert sparse["parameters"] < dense["parameters"]
    assert sparse["multiply_adds_per_sample"] < dense["multiply_adds_per_sample"]


def test_it_says_how_many_nats_a_character_takes(finished, song, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    assert main(["run", "--resume", str(finished)]) == 0
    told = capsys.readouterr().out
    for name, outcome in summary["series"].items():
        assert f"{name}: {outcome['test_loss']:.4f} nats per character on the test part" in told


def test_the_model_file_rebuilds_the_model(finished, song):
    state, structure = load_model(finished)
    assert structure["vocabulary"] == "".join(sorted(set(SONG)))
    model = rebuilt(structure)
    model.load_state_dict(state)
    outcome = json.loads((finished / "summary.json").read_text())["series"]["sparse"]
    assert evaluate(model, read_text(song, context=12).test) == (outcome["test_loss"], outcome["test_accuracy"])
    places = sum(layer["in_features"] * layer["out_features"] for layer in structure["layers"].values())
    assert sum(layer["weights"] for layer in structure["layers"].values()) == round(0.3 * places)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--batch", "0"], "batch must be at least 1"),
        (["--epochs", "-1"], "epochs at least 0"),
        (["--density", "0"], "density must lie in"),
        (["--every", "0"], "every must be at least 1"),
        (["--width", "50"], "even share"),
        (["--context", "0"], "context must be at least 1"),
        (["--dropout", "1"], "dropout must lie in"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--rewire", "often"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_is_status_2_with_a_remedy_and_no_trace(words, text, capsys, tmp_path):
    assert main(["run", "sparse_transformer", "--threads", "1", *words]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


class StopAt(Method):
    """Ctrl-C at a step, or never."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def after_step(self) -> None:
        self.seen += 1
        if self.seen == self.step:
            signal.raise_signal(signal.SIGINT)


def test_a_layer_with_more_inputs_learns_more_slowly():
    model = Transformer(11, width=160, depth=1, heads=2)
    convert_(model, ToSparse(density=0.5), where=lambda name, _: name.endswith(("qkv", "out")))
    model.norm.requires_grad_(False)
    groups = by_inputs(model, learning_rate=0.01, weight_decay=0.1)
    found = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    assert set(found) == {p for p in model.parameters() if p.requires_grad}
    block = model.blocks[0]
    layer = block.attention.out
    assert found[layer.values] == (pytest.approx(0.01 * 40 / (layer.weights / 160)), 0.1)
    assert found[block.network[2].weight] == (pytest.approx(0.01 * 40 / 640), 0.1)
    assert found[model.characters.weight] == (0.01, 0.1)
    assert found[layer.bias] == found[block.network_norm.weight] == (0.01, 0.0)
    narrow = nn.Linear(7, 3)
    assert {group["lr"] for group in by_inputs(narrow, learning_rate=0.01, weight_decay=0.1)} == {0.01}


@pytest.mark.parametrize("stop", [1, 9, 14])
def test_resumed_is_never_stopped(tmp_path, song, stop):
    text = read_text(song, context=12)
    folder = RunFolder.create(tmp_path / "run", recipe="test", options={}, seed=0)

    def train(stop: int, journal: Journal | None) -> nn.Module:
        torch.manual_seed(1)
        model = Transformer(len(text.vocabulary), width=16, depth=1, heads=2, dropout=0.2)
        convert_(convert_(model, ToSparse(density=0.3)).model, FuseEpilogue())
        optimizer = torch.optim.AdamW(by_inputs(model, learning_rate=0.01, weight_decay=0.1))
        fit(
            model,
            optimizer,
            Batches(text.train, 16, seed=2),
            validation=text.validation,
            epochs=2,
            methods=[gse(every=4), StopAt(stop)],
            scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(1.0, end=0.01, steps=20)),
            journal=journal,
        )
        return model

    whole = train(0, None)
    with pytest.raises(KeyboardInterrupt):
        train(stop, Journal(folder, "sparse"))
    resumed = train(0, Journal(folder, "sparse"))
    expected = dict(whole.named_parameters())
    for name, tensor in resumed.named_parameters():
        assert torch.equal(tensor, expected[name]), name
