"""`noctule bench cpu_blocks` measures blocks beside single weights and dense products."""

import json

import pytest

from noctule.core.errors import UsageError
from noctule_bench import program


def test_rows_of_each_block(tmp_path):
    out = tmp_path / "cpu_blocks.jsonl"
    options = "--sizes 64 --batch 16 --blocks 4 32 --densities 0.5 --rounds 3 --out".split()
    assert program.run("cpu_blocks", [*options, str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    lines = [line for line in lines if "error" not in line]  # of bfloat16 where the processor has none
    assert [line["row"] for line in lines][:4] == ["1 x 1", "4 x 4", "32 x 32", "dense float32"]
    for line in lines:
        assert line["timing"]["median_seconds"] > 0
        assert all(line[part] > 0 for part in ("forward", "dx", "dw"))
    assert lines[0]["speedup"]["ratio"] == 1.0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--blocks", "5"], "divide --sizes"),
        (["--sizes", "100"], "divide --sizes"),
        (["--densities", "0"], "must lie in"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_told(options, text):
    with pytest.raises(UsageError, match=text):
        program.run("cpu_blocks", options)
