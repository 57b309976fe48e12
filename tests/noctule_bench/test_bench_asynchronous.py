"""`noctule bench asynchronous` from its options to its lines and its table, in small."""

import json

import pytest

from noctule.core.errors import UsageError
from noctule_bench.program import run as bench

SMALL = "--data digits --epochs 4 --steps 2 --iterations 4 --apart 2".split()


TWINS = {"apart": "one", "wasap": "one", "ssp": "one", "sandblaster": "lbfgs"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods",
    [
        ("one", "wasap", "lbfgs", "sandblaster"),
        pytest.param(("one", "apart", "wasap", "ssp", "lbfgs", "sandblaster"), marks=pytest.mark.slow),
    ],
    ids=["few", "all"],
)
def test_each_is_compared_with_its_twin(capsys, methods):
    assert bench("asynchronous", [*SMALL, "--seeds", "0", "1", "--methods", *methods]) == 0
    captured = capsys.readouterr()
    kinds = {}
    for line in map(json.loads, captured.out.splitlines()):
        kinds.setdefault(line["name"], []).append(line)
    trained = {(line["method"], line["seed"]): line for line in kinds["asynchronous"]}
    assert len(trained) == 2 * len(methods)
    for (method, _), line in trained.items():
        assert line["workers"] == (1 if method in ("one", "lbfgs") else 2)
        assert line["accuracy"] > 0.2
        if method in ("wasap", "ssp"):
            assert line["samples_per_second"] == pytest.approx(4 * 1437 * 0.9 / line["seconds"], rel=0.05)
            assert sum(line["staleness"].values()) > 0
    rows = {row["method"]: row for row in kinds["asynchronous.row"]}
    assert "times_as_fast" not in rows["one"]
    for method, twin in ((method, TWINS[method]) for method in methods if method in TWINS):
        points = [100 * (trained[method, seed]["accuracy"] - trained[twin, seed]["accuracy"]) for seed in (0, 1)]
        assert rows[method]["difference_points"] == pytest.approx(sum(points) / 2)
        assert rows[method]["times_as_fast"] > 0
    assert rows["wasap"]["pace_holds"] == (rows["wasap"]["times_as_fast"] >= 1.6)
    assert "times as fast" in captured.err


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="there is no row 'fast'"):
        bench("asynchronous", [*SMALL, "--methods", "fast"])
    with pytest.raises(UsageError, match="--apart must be at least 1"):
        bench("asynchronous", ["--apart", "0"])
