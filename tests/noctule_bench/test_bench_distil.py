"""The distillation benchmark in small: its pairs, its table, and that it goes on where it stopped."""

import json

import pytest

from noctule.core.errors import UsageError
from noctule_bench import distil
from noctule_bench.program import run

SMALL = "--data digits --labels 0.1 --steps 5 --teacher-epochs 1 --teacher 4 4 4 --student 2 2 2".split()


def lines(path):
    found = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        found.setdefault(line["name"], []).append(line)
    return found


@pytest.mark.slow
def test_every_loss_is_paired_with_the_student_alone(tmp_path):
    out = tmp_path / "distil.jsonl"
    assert run("distil", [*SMALL, "--seeds", "0", "1", "--out", str(out)]) == 0
    first = lines(out)
    assert [(line["seed"], line["row"]) for line in first["distil"]] == [(s, r) for s in (0, 1) for r in distil.ROWS]
    alone, hinton = first["distil.row"][:2]
    accuracy = {(line["seed"], line["row"]): line["accuracy"] for line in first["distil"]}
    mean = sum(accuracy[s, "hinton"] - accuracy[s, "alone"] for s in (0, 1)) / 2
    assert alone["difference_points"] == 0.0
    assert hinton["difference_points"] == pytest.approx(100 * mean)
    best = max(first["distil.row"][1:], key=lambda row: row["difference_points"])
    (target,) = first["distil.target"]
    assert target["difference_points"] == best["difference_points"]
    assert target["holds"] == (best["difference_points"] >= 0.5)
    run("distil", [*SMALL, "--seeds", "0", "1", "--out", str(out)])
    assert lines(out)["distil"] == first["distil"]


def test_labels_are_as_many_of_each_class():
    from noctule.data import load

    train = load("digits", seed=0).train
    few = distil._labelled(train, 0.05, 0)
    assert {*few.targets.bincount().tolist()} == {round(0.05 * len(train) / 10)}


def test_bad_options_are_refused():
    with pytest.raises(UsageError, match="three stages"):
        run("distil", ["--data", "digits", "--student", "2", "2"])
    with pytest.raises(UsageError, match="no row 'hintn'"):
        run("distil", ["--rows", "hintn"])
