"""`noctule bench saved` from its options to its lines and its tables, in small."""

import json

import pytest

from noctule.core.errors import UsageError
from noctule_bench.program import run as bench

SMALL = "--data digits --depths 8 --batch 64 --warm 3 --rounds 2".split()


@pytest.mark.slow
def test_bytes_peak_seconds_and_accuracy(capsys, tmp_path):
    out = tmp_path / "saved.jsonl"
    words = [*SMALL, "--rows", "adaptive", "--seeds", "0", "1", "--epochs", "1", "--samples", "256", "--out", str(out)]
    assert bench("saved", words) == 0
    captured = capsys.readouterr()
    kinds = {}
    for line in map(json.loads, out.read_text().splitlines()):
        kinds.setdefault(line["name"], []).append(line)
    off, adaptive = kinds["saved"]
    assert off["row"] == "off"
    assert adaptive["bytes_kept"] < adaptive["bytes_before"] / 2
    assert adaptive["peak_bytes"] > 0
    assert adaptive["times_as_long"]["ratio"] > 0
    assert [(x["row"], x["seed"]) for x in kinds["saved.accuracy"]] == [
        (r, s) for s in (0, 1) for r in ("off", "adaptive")
    ]
    assert {x["what"] for x in kinds["saved.target"]} >= {"times fewer bytes", "points beside off"}
    assert "accuracy on the test set, ResNet-8" in captured.err
    assert bench("saved", words) == 0
    again = [json.loads(line)["name"] for line in out.read_text().splitlines()]
    assert again.count("saved.accuracy") == 4
    assert again.count("saved") == 4


def test_an_unknown_row_is_refused():
    with pytest.raises(UsageError, match="there is no row '9 bits'"):
        bench("saved", ["--rows", "9 bits"])
