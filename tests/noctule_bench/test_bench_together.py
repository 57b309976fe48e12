"""`noctule bench together` from its options to its lines and its table, in small."""

import json

import pytest

from noctule.core.errors import UsageError
from noctule.testing.link import available
from noctule_bench.program import run as bench

SMALL = "--data digits --batch 64 --reach 0.3 --look-every 10 --workers 2".split()


def run(capsys, *words):
    assert bench("together", [*SMALL, *words]) == 0
    captured = capsys.readouterr()
    kinds = {}
    for line in map(json.loads, captured.out.splitlines()):
        kinds.setdefault(line["name"], []).append(line)
    return kinds, captured.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds_", [("sparse",), pytest.param(("dense", "sparse"), marks=pytest.mark.slow)], ids="-".join
)
def test_workers_are_compared_with_one_in_pairs(capsys, tmp_path, kinds_):
    out = tmp_path / "together.jsonl"
    words = ["--epochs", "2", "--seeds", "0", "1", "--link", "--methods", "one", "natural", "diloco", "--out", str(out)]
    words += ["--kinds", *kinds_]
    kinds, table = run(capsys, *words)
    trained = {(line["kind"], line["method"], line["seed"]): line for line in kinds["together"]}
    assert len(trained) == 2 * 3 * len(kinds_)
    for (_, method, _), line in trained.items():
        assert line["workers"] == (1 if method == "one" else 2)
        assert (line["sent_bytes_per_step"] > 0) == (method != "one")
    for row in kinds["together.row"]:
        accuracy = [trained[row["kind"], row["method"], seed]["accuracy"] for seed in (0, 1)]
        one = [trained[row["kind"], "one", seed]["accuracy"] for seed in (0, 1)]
        assert row["accuracy"] == pytest.approx(sum(accuracy) / 2)
        if row["method"] != "one":
            assert row["difference_points"] == pytest.approx(50 * (sum(accuracy) - sum(one)))
            assert row["holds"] == (row["difference_points"] >= -0.3)
        if row["method"] == "natural":
            assert row["sent_bits_per_number"] == pytest.approx(8.0, rel=0.1)
    assert "- one" in table
    again, _ = run(capsys, *words)
    assert "together" not in again


@pytest.mark.slow
@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_the_race_on_a_shaped_link(capsys):
    words = ["--epochs", "12", "--seeds", "0", "--kinds", "dense", "--methods", "one", "--link", "local", "topk"]
    kinds, table = run(capsys, *words)
    plain, top, local = kinds["together.race"]
    assert (local["steps"] % 100, top["steps"] % 10) == (0, 0)
    for line in (local, top):
        assert line["ratio"] == pytest.approx(plain["seconds"] / line["seconds"])
    assert "time to 30%" in table


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="there is no row 'fast'"):
        bench("together", [*SMALL, "--methods", "fast"])
    with pytest.raises(UsageError, match="--workers must be at least 1"):
        bench("together", ["--workers", "0"])
