"""The comparison of ways to rewire runs from its options to its table, and goes on where it was."""

import json

import pytest

from noctule.core.errors import UsageError
from noctule_bench import rewiring
from noctule_bench.program import run as bench

SMALL = "--data digits --hidden 30 20 --epochs 3 --densities 0.2 --epsilons 2 --threads 1".split()


def run(capsys, *options: str):
    assert bench("rewiring", [*SMALL, *options]) == 0
    captured = capsys.readouterr()
    kinds = {}
    for line in map(json.loads, captured.out.splitlines()):
        kinds.setdefault(line["name"], []).append(line)
    return kinds, captured.err


@pytest.mark.slow
def test_all_ways_are_compared_in_pairs(capsys, tmp_path):
    out = tmp_path / "rewiring.jsonl"
    kinds, tables = run(capsys, "--seeds", "0", "1", "--out", str(out))
    trained = kinds["rewiring"]
    methods = list(rewiring.METHODS)
    assert len(trained) == 2 * 2 * len(methods)
    assert {line["weights"] for line in trained if line["sparsity"] == "epsilon 2"} == {2 * (94 + 50 + 30)}
    for line in trained:
        assert 0.05 < line["accuracy"] <= 1.0
        assert line["best_epoch"] in (1, 2, 3)
        assert (sum(line["moved"].values()) > 0) == (line["method"] != "rigl-own-schedule")  # which waits for 100 steps
    accuracy = {(line["sparsity"], line["method"], line["seed"]): line["accuracy"] for line in trained}
    for row in kinds["rewiring.row"]:
        cell = (row["sparsity"], row["method"])
        assert row["accuracy"] == pytest.approx((accuracy[*cell, 0] + accuracy[*cell, 1]) / 2)
        for other, difference in row["against"].items():
            assert (difference is None) == (other == row["method"])
            pairs = [accuracy[*cell, seed] - accuracy[row["sparsity"], other, seed] for seed in (0, 1)]
            assert difference is None or difference["difference_points"] == pytest.approx(100 * sum(pairs) / 2)
    assert [line["row"] for line in kinds["rewiring.agreement"]] == [
        "ctre-seq-sampled - ctre-seq",
        "ctre-sim-sampled - ctre-sim",
        "ctre-seq-sampled-64 - ctre-seq",
        "ctre-sim-sampled-64 - ctre-sim",
        "ctre-seq-sampled-1 - ctre-seq",
        "ctre-sim-sampled-1 - ctre-sim",
    ] * 2
    assert tables.count("ctre-sim-sampled ") == 4
    assert "exact and sampled forms" in tables

    again, _ = run(capsys, "--seeds", "0", "1", "--methods", "set", "rigl", "--out", str(out))
    assert "rewiring" not in again
    assert [row["method"] for row in again["rewiring.row"]] == ["set", "rigl"] * 2
    longer, _ = run(capsys, "--seeds", "0", "2", "--methods", "set", "--out", str(out))
    assert [line["seed"] for line in longer["rewiring"]] == [2, 2]


def test_an_equal_training_ends_equally_and_seq_becomes_random(capsys):
    options = ("--seeds", "0", "--methods", "ctre-seq", "--epsilons", "--patience", "1", "--epochs", "12")
    first, second = (run(capsys, *options)[0]["rewiring"][0] for _ in range(2))
    assert first["validation_curve"] == second["validation_curve"]
    assert first["accuracy"] == second["accuracy"]
    curve = first["validation_curve"]
    fallen = next(k for k in range(1, 12) if curve[k] <= max(curve[:k]))
    assert first["random_from"] == second["random_from"] == fallen + 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--methods", "ctre"], "did you mean ctre-s"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--seeds"], "--seeds must be at least 1"),
        (["--densities", "--epsilons"], "--densities must be at least 1"),
    ],
)
def test_a_wrong_command_line_is_told_beforehand(options, text):
    with pytest.raises(UsageError, match=text):
        bench("rewiring", [*SMALL, *options])
