"""`noctule bench convolution` from its options to its lines and its tables, in small."""

import json

import pytest

from noctule.core.errors import UsageError
from noctule_bench import convolution
from noctule_bench.program import run as bench


@pytest.mark.slow
def test_speed_targets_and_profile(capsys):
    options = "--threads 1 --channels 8 --sizes 6 --batch 4 --densities 0.5 0.05 --rounds 1 --block-ms 1"
    assert bench("convolution", options.split()) == 0
    captured = capsys.readouterr()
    kinds = {}
    for line in map(json.loads, captured.out.splitlines()):
        kinds.setdefault(line["name"], []).append(line)
    sparse = {row.name for row in convolution.ROWS if not row.dense}
    assert {(line["row"], line["density"]) for line in kinds["convolution"] if line["row"] in sparse} == {
        (row, density) for row in sparse for density in (0.5, 0.05)
    }
    for line in kinds["convolution.target"]:
        assert (line["density"], line["target"]) == (0.05, 2.0)
        assert line["holds"] == (line["speedup"]["ratio"] >= 2.0)
    (profile,) = kinds["convolution.profile"]
    assert profile["density"] == 0.05
    assert set(profile["milliseconds"]) == {*convolution.PASSES, "step"}
    assert min(profile["milliseconds"].values()) > 0.0
    assert "convolution: milliseconds of each pass alone" in captured.err


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="must lie in"):
        convolution.convolution(densities=(0.0,))
