"""The benchmark of a smaller network in small: every stage is stored and scored, and it goes on where it stopped."""

import json

import pytest

from noctule_bench.program import run

SMALL = "--data digits --epochs 2 --student-epochs 2".split()


@pytest.mark.slow
def test_every_stage_is_stored_and_scored_in_pairs(tmp_path):
    out = tmp_path / "smaller.jsonl"
    for seeds in (("0",), ("0", "1")):
        assert run("smaller", [*SMALL, "--seeds", *seeds, "--out", str(out)]) == 0
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    trained = [line for line in lines if line["name"] == "smaller"]
    assert [line["seed"] for line in trained] == [0, 1]
    last = [line for line in lines if line["name"] == "smaller.row"][-1]
    first, end = ([line["stages"][stage] for line in trained] for stage in ("full", "int8"))
    assert last["fewer"] == pytest.approx(sum(a["bytes"] / b["bytes"] for a, b in zip(first, end, strict=True)) / 2)
    points = [100 * (b["accuracy"] - a["accuracy"]) for a, b in zip(first, end, strict=True)]
    assert last["difference_points"] == pytest.approx(sum(points) / 2)
    for line in trained:
        distilled, int8 = line["stages"]["distilled"], line["stages"]["int8"]
        assert int8["bytes"] < distilled["bytes"] / 2
        assert abs(int8["accuracy"] - distilled["accuracy"]) < 0.05
    assert [line["row"] for line in lines if line["name"] == "smaller.target"][-2:] == ["fewer", "difference_points"]
