"""A run predicts in a fresh process what its model says, with the preparation and the scaling that training used."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from noctule import load_model
from noctule.cli.main import main
from noctule.cli.predictions import predict, trained_model
from noctule.core.errors import DataError, UsageError
from noctule.data import load, standardize
from noctule.deploy import export
from noctule.recipes import sparse_mlp
from noctule.recipes.sparse_mlp import network
from noctule.report import RunFolder

SMALL = ["--hidden", "12", "--epochs", "2", "--density", "0.5", "--threads", "1"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def guests(path: Path, rows: int = 90, *, number: bool = False) -> Path:
    """A table with gaps, text, dates and a key, of which the last column is to be predicted."""
    random = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["GuestId", "Name", "Age", "Room", "Since", "Paid", "Price" if number else "Stays"])
        for at in range(rows):
            age, room = int(random.integers(1, 90)), str(random.choice(["small", "large", ""]))
            since = f"{random.integers(1, 29):02d}.{random.integers(1, 13):02d}.2020"
            target = f"{age * 2.5 + 40 * (room == 'large'):.2f}" if number else ("long" if age > 50 else "no")
            shown = "" if random.random() < 0.2 else age
            writer.writerow([at, f"Guest {at}", shown, room, since, bool(at % 3), target])
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("guests")
    data = guests(folder / "guests.csv")
    assert main(["run", "sparse_mlp", "--data", str(data), *SMALL, "--out", str(folder / "run")]) == 0
    return folder / "run", data


def test_the_run_says_what_it_made_of_the_data(trained, capsys):
    run, data = trained
    assert main(["data", str(data)]) == 0
    said = capsys.readouterr().out
    assert "target 'Stays': 2 classes: long = 0, no = 1" in said
    assert "left out: GuestId" in said
    about = json.loads((run / "summary.json").read_text())["data"]
    assert about["labels"] == ["long", "no"]
    assert (about["target"], about["task"]) == ("Stays", "classification")
    assert "classes long / no" in (run / "report.html").read_text()
    kept = json.loads((run / "data.json").read_text())
    assert kept["target"]["labels"] == load_model(run)[1]["labels"] == ["long", "no"]
    assert {column["name"] for column in kept["columns"]} == {"Age", "Room", "Since", "Paid"}


@pytest.mark.parametrize("series", ["sparse", "dense"])
def test_a_fresh_process_predicts_what_the_model_says(series, trained, tmp_path):
    run, data = trained
    out = tmp_path / "out.csv"
    words = ["predict", str(run), str(data), "--out", str(out), "--series", series]
    done = subprocess.run([sys.executable, "-m", "noctule.cli", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "90 predictions" in done.stderr
    state, structure = load_model(run if series == "sparse" else run / "dense.safetensors")
    model = network(structure, sparse=series == "sparse")
    model.load_state_dict(state)
    splits = standardize(load(data))
    assert splits.preparation is not None
    labels = splits.preparation.target.labels
    with torch.no_grad():
        said = {part: model.eval()(getattr(splits, part).inputs).softmax(1) for part in ("train", "test")}
    rows = rows_of(out.read_text())
    assert list(rows[0]) == ["prediction", "probability_long", "probability_no"]
    found = torch.tensor([[float(row[f"probability_{label}"]) for label in labels] for row in rows])
    for part in said.values():  # each sample of a part is among the rows, in order
        at = [int((found - p).abs().sum(1).argmin()) for p in part]
        assert (found[at] - part).abs().max() < 1e-4
    assert [row["prediction"] for row in rows] == [str(labels[at]) for at in found.argmax(1).tolist()]


def test_columns_are_matched_by_name_and_the_target_may_be_missing(trained, tmp_path):
    run, data = trained
    rows = list(csv.DictReader(data.read_text().splitlines(), delimiter=";"))
    names = ["Since", "Colour", "Room", "Paid", "Age"]
    with open(tmp_path / "new.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", restval="red")
        writer.writeheader()
        writer.writerows(rows)
    whole, part = predict(run, data), predict(run, tmp_path / "new.csv")
    assert whole.names == part.names
    assert part.score is None
    assert whole.score is not None
    truth = [row["Stays"] for row in rows]
    assert whole.score == (
        "accuracy",
        np.mean([name == wanted for name, wanted in zip(whole.names, truth, strict=True)]),
    )


@pytest.mark.parametrize(
    ("header", "cells", "says"),
    [
        ("Since,Room,Paid", "01.01.2020,small,True", "lacks the column 'Age'"),
        ("Since,Room,Paid,age", "01.01.2020,small,True,3", r"lacks the column 'Age' \(it has 'age'"),
        ("Since,Room,Paid,Age", "01.01.2020,small,True,old", "line 2, column 'Age': 'old' is no finite number"),
        ("Since,Room,Paid,Age", "soon,small,True,3", "line 2, column 'Since': 'soon' is no date"),
    ],
)
def test_data_that_do_not_fit_are_refused(header, cells, says, trained, tmp_path):
    (tmp_path / "new.csv").write_text(f"{header}\n{cells}\n")
    with pytest.raises(DataError, match=says):
        predict(trained[0], tmp_path / "new.csv")


def test_levels_that_training_has_not_seen_are_told_once(trained, tmp_path):
    (tmp_path / "new.csv").write_text("Since,Room,Paid,Age\n" + "01.01.2020,attic,True,3\n" * 3)
    with pytest.warns(UserWarning, match="'Room' has 'attic' in 3 rows but in no training row") as told:
        assert len(predict(trained[0], tmp_path / "new.csv")) == 3
    assert len(told) == 1


def test_a_regression_ends_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = guests(tmp_path / "prices.csv", number=True)
    words = ["run", "sparse_mlp", "--data", "prices.csv", *SMALL, "--epochs", "30", "--learning-rate", "0.03"]
    assert main([*words, "--out", "run"]) == 0
    said = capsys.readouterr().out
    assert "target 'Price': a number, so this is a regression" in said
    assert "R2 0." in said
    summary = json.loads(Path("run/summary.json").read_text())
    outcome = summary["series"]["sparse"]
    assert 0.2 < outcome["test_r2"] <= 1
    assert 0 < outcome["test_mae"] <= outcome["test_rmse"] < 60, "in the unit of the target"
    assert summary["data"]["task"] == "regression"
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all("validation_r2" in record and "validation_accuracy" not in record for record in records)
    page = Path("run/report.html").read_text()
    assert "Test R²" in page
    assert "Validation R²" in page
    assert main(["compare", "run"]) == 0
    assert "R2 0." in capsys.readouterr().out
    found = predict("run", data)
    assert found.probabilities is None
    assert found.score is not None
    assert found.score[0] == "R2"
    assert found.score[1] > 0.2
    assert main(["predict", "run", "prices.csv"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [float(row["prediction"]) for row in rows] == pytest.approx(found.names, rel=1e-6)


def test_validation_0_trains_on_all_but_the_test_part(tmp_path, capsys):
    data = guests(tmp_path / "guests.csv")
    words = ["run", "sparse_mlp", "--data", str(data), *SMALL, "--validation", "0", "--compare", "none"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "no validation part" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["train"] + summary["data"]["test"] == 90
    assert summary["data"]["validation"] == 0
    assert summary["series"]["sparse"]["best_epoch"] == 2
    assert "validation_loss" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_recipe_takes_data_from_memory(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(guests(tmp_path / "guests.csv"), sep=";")
    run = RunFolder.create(tmp_path / "run", recipe="sparse_mlp", options={}, seed=0)
    with run:
        sparse_mlp(run, data=frame, hidden=(12,), epochs=1, density=0.5, compare="none")
    from_file, from_frame = predict(run, tmp_path / "guests.csv"), predict(run, frame.drop(columns="Stays"))
    assert from_file.names == from_frame.names


def test_a_run_that_goes_on_finds_its_data_changed(trained, tmp_path):
    run = RunFolder.create(tmp_path / "run", recipe="sparse_mlp", options={}, seed=0)
    options = {"hidden": (12,), "epochs": 1, "density": 0.5, "compare": "none"}
    sparse_mlp(run, data=str(trained[1]), **options)
    (run.path / "summary.json").unlink()
    sparse_mlp(run, data=str(trained[1]), **options)
    (run.path / "summary.json").unlink()
    with pytest.raises(DataError, match=r"are not those that .* began with"):
        sparse_mlp(run, data=str(guests(tmp_path / "guests.csv", rows=91)), **options)


def test_built_in_sets_and_arrays(tmp_path):
    run = tmp_path / "run"
    assert main(["run", "sparse_mlp", *SMALL, "--out", str(run), "--compare", "none"]) == 0
    found = predict(run, "digits")
    assert len(found) == 1797
    assert found.labels == tuple(range(10))
    digits = load("digits")
    np.save(tmp_path / "new.npy", digits.test.inputs.numpy())
    np.savez(tmp_path / "new.npz", X=digits.test.inputs.numpy().reshape(-1, 8, 8))
    test = predict(run, digits)
    assert test.score is not None
    assert test.score[1] == json.loads((run / "summary.json").read_text())["series"]["sparse"]["test_accuracy"]
    for other in (digits.test, digits.test.inputs.numpy(), tmp_path / "new.npy", tmp_path / "new.npz"):
        assert predict(run, other).names == test.names
    with pytest.raises(
        DataError, match=r"samples of shape \(63,\), but the model was trained on samples of shape \(8, 8\)"
    ):
        predict(run, digits.test.inputs.numpy()[:, 1:])


@pytest.mark.parametrize("recipe", ["sparse_mlp", "sparse_cnn"])
def test_pictures(recipe, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    for at in range(24):
        path = tmp_path / "pets" / ("cat" if at % 2 else "dog") / f"{at}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.full((8, 8, 3), 200 * (at % 2) + at, np.uint8)).save(path)
    words = ["--hidden", "8"] if recipe == "sparse_mlp" else ["--channels", "4", "--batch", "8"]
    words = ["run", recipe, "--data", str(tmp_path / "pets"), *words, "--epochs", "1", "--density", "0.5"]
    assert main([*words, "--compare", "none", "--out", str(tmp_path / "run")]) == 0
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "pets" / "cat")]) == 0
    out = capsys.readouterr().out
    rows = rows_of(out[out.index("file,") :])
    assert [row["file"] for row in rows] == sorted(f"{at}.png" for at in range(1, 24, 2))
    whole = predict(tmp_path / "run", tmp_path / "pets")
    assert whole.files is not None
    said = dict(zip(whole.files, whole.names, strict=True))
    assert all(said[f"cat/{row['file']}"] == row["prediction"] for row in rows)
    assert predict(tmp_path / "run", tmp_path / "pets" / "dog" / "0.png").names == [said["dog/0.png"]]


def test_a_shipped_file_predicts_what_its_run_does(trained, tmp_path, capsys):
    run, data = trained
    model, shipped = trained_model(RunFolder(run), "sparse"), tmp_path / "model.noctule"
    export(model, torch.zeros(4, features_of(model)), shipped, to="noctule")
    with pytest.raises(DataError, match=r"data\.json"):
        predict(shipped, str(data))
    shutil.copy(run / "data.json", tmp_path)
    expected, found = predict(run, str(data)), predict(shipped, str(data))
    assert found.names == expected.names
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-5)
    with pytest.raises(UsageError, match="is one model"):
        predict(shipped, str(data), series="dense")
    (tmp_path / "model.txt").touch()
    with pytest.raises(UsageError, match="no runtime here has files of this kind"):
        predict(tmp_path / "model.txt", str(data))


def test_a_card_is_text_json_and_a_page(trained, tmp_path, capsys):
    run, data = trained
    model, shipped = trained_model(RunFolder(run), "sparse"), tmp_path / "model.noctule"
    export(model, torch.zeros(4, features_of(model)), shipped, to="noctule")
    shutil.copy(run / "data.json", tmp_path)
    assert main(["card", str(shipped), str(data), "--seconds", "0.05", "--batches", "1", "9"]) == 0
    printed, card = capsys.readouterr().out, json.loads((tmp_path / "model.noctule.card.json").read_text())
    assert card["accuracy"] == pytest.approx(predict(run, str(data)).score[1])
    assert [batch["batch"] for batch in card["batches"]] == [1, 9]
    assert not card["torch_loaded"]
    assert f"{card['bytes']:,}" in printed
    page = (tmp_path / "model.noctule.card.html").read_text()
    assert "What a call costs" in page
    assert "http" not in page.replace("http-equiv", "")
    assert main(["card", str(tmp_path / "none"), str(data)]) == 2
    assert main(["card", str(shipped), str(data), "--batches", "0"]) == 2


def features_of(model) -> int:
    return next(m.in_features for m in model.modules() if hasattr(m, "in_features"))


def test_what_cannot_predict_says_so(trained, tmp_path, capsys):
    assert main(["predict", str(tmp_path), "digits"]) == 2
    assert "is not a run" in capsys.readouterr().err
    RunFolder.create(tmp_path / "new", recipe="sparse_mlp", options={}, seed=0)
    assert main(["predict", str(tmp_path / "new"), "digits"]) == 1
    assert "nothing was trained yet" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no data set, file or folder called"):
        predict(trained[0], "nowhere.csv")
    assert main(["predict", str(trained[0]), str(trained[1]), "--out", str(tmp_path)]) == 2
    with pytest.raises(DataError, match="the model was trained on a table"):
        predict(trained[0], "digits")
