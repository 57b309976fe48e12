"""Each program runs from its options to its lines and its table, in small."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from xml.etree import ElementTree

import pytest

from noctule.core.errors import UsageError
from noctule_bench.program import BENCHMARKS, main
from noctule_bench.program import run as bench

MACHINE = {"cpu", "cores", "commit", "threads", "load_average", "torch"}


def run(capsys, name, options, *, rows):
    """Its lines of JSON, by kind, and its tables."""
    assert bench(name, [*options.split(), "--rows", *rows]) == 0
    captured = capsys.readouterr()
    kinds = {}
    for line in map(json.loads, captured.out.splitlines()):
        assert line["machine"].keys() >= MACHINE
        assert line["threads"] == line["machine"]["threads"] == 1
        kinds.setdefault(line["name"], []).append(line)
    for line in (line for lines in kinds.values() for line in lines if "error" in line):
        assert line["row"] == "sparselab"
        assert find_spec("sparselab") is None
        assert line["error"].startswith("not installed: pip install noctule[bench]")
    return kinds, captured.err


LAYERS = ["noctule", "dense fp32", "torch CSR, own backward"]
FASHION = ["noctule", "dense fp32", "torch CSR", "sparselab"]


@pytest.mark.parametrize("rows", [LAYERS, pytest.param([*LAYERS, "noctule bf16"], marks=pytest.mark.slow)], ids=len)
def test_layers(capsys, tmp_path, rows):
    out = tmp_path / "results" / "layers.jsonl"
    options = (
        f"--threads 1 --densities 0.01 --sweep 0.9 --large 64 --rounds 1 --large-rounds 1 --block-ms 1 --out {out}"
    )
    kinds, tables = run(capsys, "layers", options, rows=rows)
    assert len(out.read_text().splitlines()) == sum(map(len, kinds.values()))

    found = {(line["row"], line["layout"], line["features"][0], line["density"]): line for line in kinds["layers"]}
    assert found.keys() >= {(row, "row-major", size, 0.01) for row in rows for size in (64, 1000)}
    assert found.keys() >= {("noctule", layout, 1000, 0.9) for layout in ("row-major in and out", "kernels alone")}
    assert ("torch CSR, own backward", "row-major", 1000, 0.9) not in found
    for line in found.values():
        assert ("error" in line) != (line.keys() >= {"timing", "gflops", "peak_share", "busy_cores", "speedup"})
    assert kinds["layers.peak"][0]["gflops"] > 0

    even = kinds["layers.break_even"]
    assert [(line["layout"], line["against"]) for line in even] == [
        ("row-major", "dense fp32"),
        ("feature-major", "dense fp32"),
    ]
    assert all(set(line["speedups"]) == {"0.9", "0.01"} for line in even)
    assert "noctule is faster below this density" in tables

    targets = {(line["layout"], line["against"]): line for line in kinds["layers.target"]}
    dense = {"row-major": 15.0, "feature-major": 25.0, "kernels alone": 35.0}
    assert {layout: targets[layout, "dense fp32"]["target"] for layout in dense} == dense
    assert targets["row-major", "torch CSR, own backward"]["target"] == 1.0
    assert all(line["holds"] == (line["speedup"]["ratio"] >= line["target"]) for line in targets.values())
    assert "layers: targets" in tables


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        FASHION,
        pytest.param(
            [*FASHION, "noctule, not fused", "noctule bf16 autocast", "dense bf16 autocast"], marks=pytest.mark.slow
        ),
    ],
    ids=len,
)
def test_fashion(capsys, rows):
    options = "--threads 1 --data random --samples 256 --steps 2 --rounds 2"
    kinds, tables = run(capsys, "fashion", options, rows=rows)
    assert sorted(line["row"] for line in kinds["fashion"]) == sorted(rows)
    for line in kinds["fashion"]:
        assert (line["data"], line["samples"], line["steps_per_epoch"]) == ("random", 256, 2)
        if "error" not in line:
            assert line["seconds_per_epoch"] == pytest.approx(line["timing"]["median_seconds"])
            assert line["extrapolated"] == "2 steps from the median of 2 turns of 2 steps each"
            assert line["speedup"]["ratio"] > 0
    targets = {line["against"]: line["target"] for line in kinds["fashion.target"]}
    assert targets["dense fp32"] in (7.0, 3.0)  # 3 where it is also the fastest
    assert "fashion: targets" in tables


@pytest.mark.slow
def test_memory(capsys):
    kinds, tables = run(capsys, "memory", "--steps 2", rows=["noctule", "dense fp32"])
    sparse, dense = kinds["memory"]
    places = 784 * 1000 + 1000 * 1000 + 1000 * 1000 + 1000 * 10
    assert dense["weights_bytes"] == dense["gradient_bytes"] == dense["optimizer_bytes"] == 4 * (places + 3010)
    assert dense["index_bytes"] == 0
    assert sparse["weights_bytes"] == 4 * (125_685 + 3010)
    assert 6 * 125_685 < sparse["index_bytes"] < 10 * 125_685
    assert sparse["times_smaller"] == pytest.approx(dense["total_bytes"] / sparse["total_bytes"])
    assert sparse["peak_above_bytes"] < dense["peak_above_bytes"] < dense["peak_memory_bytes"]
    (target,) = kinds["memory.target"]
    assert target["holds"]
    assert target["times_smaller"] > target["target"] == 10.0
    assert "memory: targets" in tables


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("layers", ["--rows", "sparslab"], "did you mean sparselab"),
        ("layers", ["--densities", "1.5"], "must lie in"),
        ("layers", ["--round", "3"], "--rounds"),
        ("layers", ["--threads", "0"], "--threads must be at least 1"),
        ("fashion", ["--rows", "dense"], "Rows: noctule"),
        ("fashion", ["--data", "random", "--weights", "99999999"], "do not fit"),
        ("fashion", ["--data", "random", "--samples", "100"], "do not fill a batch of 128"),
        ("fashion", ["--data", "digits"], "64 features and 10 classes"),
        ("memory", ["--widths", "10"], "widths must be at least two"),
    ],
)
def test_a_wrong_command_line_is_told(name, options, text):
    with pytest.raises(UsageError, match=text):
        bench(name, options)


def test_the_list_says_what_each_measures(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    listed = re.findall(r"^  (\w+) +(\S.*[.?])$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in listed] == 2 * list(BENCHMARKS)
    with pytest.raises(UsageError, match="did you mean layers"):
        main(["laers"])


def test_the_listing_loads_no_torch():
    code = "import sys; from noctule_bench.program import main; main([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_figure_draws_each_row_at_each_density(tmp_path):
    row = {"name": "layers", "threads": 1, "batch": 8, "layout": "row-major", "features": [32, 32]}
    found = [
        {**row, "row": name, "density": density, "timing": {"median_seconds": 0.001 * density}}
        for name in ("noctule", "dense fp32", "dense bf16")
        for density in (0.1, 0.5)
    ]
    log, out = tmp_path / "layers.jsonl", tmp_path / "step.svg"
    log.write_text("".join(json.dumps(line) + "\n" for line in [*found, {**found[0], "threads": 2}]))
    assert bench("figure", ["--log", str(log), "--out", str(out)]) == 0
    drawn = ElementTree.parse(out).getroot()
    points = drawn.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(points) == 2 * len(found)
    with pytest.raises(UsageError, match="--threads 3"):
        bench("figure", ["--log", str(log), "--out", str(out), "--threads", "3"])


def test_a_program_is_a_script_too():
    done = subprocess.run(
        [sys.executable, "-m", "noctule_bench", "memory", "--steps", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: --steps must be at least 1, got 0\n"
