"""`noctule bench efficient` trains, ships and scores, and does nothing twice."""

import json

import pytest

from noctule_bench import program


@pytest.mark.slow
def test_rows_are_scored_from_their_files_and_not_made_twice(tmp_path, capsys):
    out, files = tmp_path / "efficient.jsonl", tmp_path / "files"
    words = "--data digits --seeds 0 --epochs 1 --student-epochs 1 --widths 0.25 --rows full distilled".split()
    words += ["--files", str(files), "--out", str(out)]
    assert program.run("efficient", words) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    rows = {line["row"]: line for line in lines if line["name"] == "efficient"}
    assert rows.keys() == {"full", "distilled", "int8"}
    assert rows["int8"]["bytes"] < rows["distilled"]["bytes"] / 2 < rows["full"]["bytes"] / 10
    before = {path: path.stat().st_mtime_ns for path in files.iterdir()}
    assert program.run("efficient", words) == 0
    assert {path: path.stat().st_mtime_ns for path in files.iterdir()} == before
    assert "times fewer" in capsys.readouterr().err
