"""The shrinking benchmark in small: its pairs, its figures, and that its baseline is the recipe."""

import json

import pytest

from noctule.core.errors import UsageError
from noctule.recipes import sparse_mlp
from noctule.report import RunFolder
from noctule_bench.program import run as bench

OPTIONS = "--data digits --hidden 60 40 --density 0.2 --epochs 4 --rounds 6 --percentile 30 --first 1 --apart 1 --last 2 --skip"


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What it wrote, by kind."""
    out = tmp_path_factory.mktemp("shrinking") / "lines.jsonl"
    assert bench("shrinking", [*OPTIONS.split(), "--seeds", "0", "1", "--out", str(out)]) == 0
    kinds: dict[str, list[dict]] = {}
    for line in map(json.loads, out.read_text().splitlines()):
        kinds.setdefault(line["name"], []).append(line)
    return kinds


def test_each_pair_says_what_went_and_what_it_cost(lines):
    assert [line["seed"] for line in lines["shrinking"]] == [0, 1]
    for line in lines["shrinking"]:
        assert line["whole_widths"] == [60, 40, 10]
        assert line["less_widths"] == [30, 20, 10]  # 60 42 30 and 40 28 20
        assert line["removed_share"] == 0.5
        assert line["whole_weights"] > line["less_weights"] > 0
        assert line["whole_footprint"]["total_bytes"] > line["less_footprint"]["total_bytes"]
        assert line["difference_points"] == pytest.approx(100 * (line["less_accuracy"] - line["whole_accuracy"]))
        assert line["speedup"]["low"] <= line["speedup"]["ratio"] <= line["speedup"]["high"]
        assert line["whole_seconds_per_step"] > 0


def test_the_targets_are_judged_by_the_lines(lines):
    removed, points, step = lines["shrinking.target"]
    assert (removed["found"], removed["target"], removed["holds"]) == (0.5, 0.5, True)
    mean = sum(line["difference_points"] for line in lines["shrinking"]) / 2
    assert points["found"] == pytest.approx(mean)
    assert points["holds"] == (mean >= -0.5)
    assert points["pairs"] == 2
    assert step["found"] == min(line["speedup"]["low"] for line in lines["shrinking"])
    assert step["holds"] == (step["found"] > 1.0)


def test_without_pruning_it_is_the_recipe(lines, tmp_path):
    with RunFolder.create(tmp_path / "run", recipe="sparse_mlp", options={}, seed=1) as run:
        options = {"data": "digits", "hidden": (60, 40), "density": 0.2, "epochs": 4, "seed": 1, "compare": "none"}
        summary = sparse_mlp(run, **options)
    assert summary["series"]["sparse"]["test_accuracy"] == lines["shrinking"][1]["whole_accuracy"]


def test_each_way_removes_neurons_of_a_dense_network(capsys):
    options = (
        "--data digits --hidden 60 40 --density 1 --epochs 3 --rounds 2 --last 2 --least 15 --removed 0.7 --seeds 0"
    )
    assert (
        bench("shrinking", [*options.split(), "--percentile", "50", "--ways", "importance", "spectral", "--skip"]) == 0
    )
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    trained = {line["way"]: line for line in lines if line["name"] == "shrinking"}
    assert {way: line["less_widths"] for way, line in trained.items()} == {
        "importance": [15, 15, 10],
        "spectral": [15, 15, 10],
    }
    shares = [line for line in lines if line["name"] == "shrinking.target" and line["target"] == 0.7]
    assert [line["way"] for line in shares if line["found"] == 0.7 and line["holds"]] == ["importance", "spectral"]
    with pytest.raises(UsageError, match="give --density 1"):
        bench("shrinking", ["--data", "digits", "--ways", "spectral"])


def test_a_network_without_hidden_layers_is_refused():
    with pytest.raises(UsageError, match="--hidden must be at least 1"):
        bench("shrinking", ["--data", "digits", "--hidden"])
