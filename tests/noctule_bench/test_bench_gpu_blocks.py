"""`noctule bench gpu_blocks` measures its rows on a CUDA device, and says so where there is none."""

import json

import pytest
import torch

from noctule.core.errors import UsageError
from noctule_bench import program


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_of_each_block(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "gpu_blocks.jsonl"
    options = "--size 256 --batch 128 --blocks 16 64 --densities 0.5 --rounds 3 --calls 2 --out".split()
    assert program.run("gpu_blocks", [*options, str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    timed = {(line["row"], line["part"], line["block"]) for line in lines if "error" not in line}
    assert timed >= {(r, p, b) for r in ("noctule", "cublas") for p in ("forward", "dx", "dw") for b in (16, 64)}
    assert all(line["error_of_y"] < 0.01 for line in lines if line["row"] == "noctule")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "needs a CUDA device and Triton"),
        (["--blocks", "8"], "16, 32 or 64 and divide"),
        (["--size", "100"], "divide --size 100"),
        (["--densities", "0"], "must lie in"),
        (["--calls", "0"], "--calls must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_told(options, text):
    if not options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match=text):
        program.run("gpu_blocks", options)
