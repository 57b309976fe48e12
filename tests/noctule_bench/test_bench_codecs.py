"""The codec benchmark in small: its lines, its figures, its table."""

import json

import pytest

from noctule.cli.main import main as command
from noctule.core.errors import UsageError
from noctule_bench import codecs
from noctule_bench.program import run as bench


def test_each_codec_has_its_figures(capsys):
    assert command(["bench", "codecs", "--threads", "1", "--elements", "20000", "--rounds", "3"]) == 0
    captured = capsys.readouterr()
    kinds: dict[str, list[dict]] = {}
    for line in map(json.loads, captured.out.splitlines()):
        kinds.setdefault(line["name"], []).append(line)
    rows = {line["row"]: line for line in kinds["codecs"]}
    assert set(codecs.CODECS) < set(rows)
    for line in rows.values():
        for way in ("encode", "decode"):
            rate = line["bytes"] / line[way]["median_seconds"] / 1e9
            assert line[f"{way}_gigabytes_per_second"] == pytest.approx(rate, abs=1e-3)
    natural, plain = rows["natural"], rows["natural, plain torch"]
    assert natural["bits_per_element"] == plain["bits_per_element"] == 8 * 20020 / 20000
    assert natural["squared_error"] == pytest.approx(0.081, abs=0.005)
    assert rows["copy"]["squared_error"] == 0.0
    assert rows["copy"]["worth_it_below_megabits"] == 0.0
    assert rows["top 1 %"]["squared_error"] == pytest.approx(rows["top 1 %, torch.topk"]["squared_error"])
    seconds = natural["encode"]["median_seconds"] + natural["decode"]["median_seconds"]
    assert natural["worth_it_below_megabits"] == pytest.approx(0.75 * 80_000 * 8 / seconds / 1e6, rel=0.01)
    targets = {(line["row"], line["what"]): line for line in kinds["codecs.target"]}
    assert set(targets) == set(codecs.TARGETS)
    for (row, way), line in targets.items():
        assert line["gigabytes_per_second"] == rows[row][f"{way}_gigabytes_per_second"]
        assert line["holds"] == (line["gigabytes_per_second"] >= 2.0)
    assert "codecs: targets" in captured.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--rows", "naturl"], "did you mean natural"),
        (["--elements", "999"], "--elements must be"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_a_wrong_command_line_is_told(words, text):
    with pytest.raises(UsageError, match=text):
        bench("codecs", words)
