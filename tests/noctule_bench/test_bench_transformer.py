"""The program runs from its options to its lines and its tables, in small."""

import json

import pytest

from noctule.core.errors import UsageError
from noctule_bench import transformer
from noctule_bench.program import run as bench
from noctule_bench.transformer_steps import KINDS, REST


@pytest.fixture
def song(tmp_path):
    path = tmp_path / "song.txt"
    path.write_text("The bat sings at night, and sleeps by day; by day it hangs, at night it sings. " * 20)
    return path


def run(capsys, song, *options):
    small = f"--text {song} --threads 1 --depth 1 --batch 4 --context 12 --density 0.2 --rounds 2 --block-ms 1"
    assert bench("transformer", [*small.split(), *map(str, options)]) == 0
    captured = capsys.readouterr()
    kinds = {}
    for line in map(json.loads, captured.out.splitlines()):
        kinds.setdefault(line["name"], []).append(line)
    return kinds, captured.err


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(128,), pytest.param((64, 128), marks=pytest.mark.slow)])
def test_speed_and_profile(capsys, song, monkeypatch, widths):
    monkeypatch.setattr(transformer, "TARGET_FROM", 128)
    options = ("--widths", *widths, "--parts", "speed", "profile")
    kinds, tables = run(capsys, song, *options)
    rows = ["noctule", "noctule bf16 autocast", "dense fp32", "dense bf16 autocast"]
    assert [(line["row"], line["width"]) for line in kinds["transformer"]] == [(r, w) for w in widths for r in rows]
    for line in kinds["transformer"]:
        assert line["characters_per_second"] == pytest.approx(48 / line["timing"]["median_seconds"], abs=1)
    (target,) = kinds["transformer.target"]
    assert target["width"] == 128
    assert target["holds"] == (target["speedup"]["ratio"] >= 1.5)
    profiles = {(line["row"], line["width"]): line["shares"] for line in kinds["transformer.profile"]}
    assert len(profiles) == 4 * len(widths)
    for (row, _), shares in profiles.items():
        assert set(shares) == {*KINDS, REST}
        assert sum(shares.values()) == pytest.approx(1.0, abs=0.01)
        busy = {kind for kind in ("sparse products", "dense products") if shares[kind] > 0.01}
        assert busy == {"sparse products" if row.startswith("noctule") else "dense products"}
        assert min(shares[kind] for kind in ("attention", "layer norm", "optimizer")) > 0.0
    assert "transformer: where the time of a step goes" in tables


def test_quality(capsys, song, tmp_path):
    options = ("--quality-width", 64, "--seeds", 0, 1, "--parts", "quality", "--runs", tmp_path / "runs")
    kinds, tables = run(capsys, song, *options)
    assert [line["seed"] for line in kinds["transformer.quality"]] == [0, 1]
    for line in kinds["transformer.quality"]:
        assert line["difference_nats"] == pytest.approx(line["sparse_nats"] - line["dense_nats"])
        assert line["steps"] == 27  # 105 windows in batches of four
    (target,) = kinds["transformer.target"]
    assert target["found"] == pytest.approx(sum(x["difference_nats"] for x in kinds["transformer.quality"]) / 2)
    assert target["holds"] == (target["found"] <= 0.05)
    assert "transformer: nats per character" in tables
    again, _ = run(capsys, song, *options)  # what was trained is not trained again
    assert [x["sparse_nats"] for x in again["transformer.quality"]] == [
        x["sparse_nats"] for x in kinds["transformer.quality"]
    ]
    with pytest.raises(UsageError, match="run with other options"):
        run(capsys, song, *options, "--epochs", 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--parts", "sped"], "did you mean speed"),
        (["--density", "0"], "density must lie in"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_a_wrong_command_line_is_told(options, text):
    with pytest.raises(UsageError, match=text):
        bench("transformer", options)
