"""The benchmarks are a package of their own, which the command line finds through its entry point and does not know by name."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from noctule.cli import bench
from noctule.cli.main import main

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("installed", [True, False])
def test_the_benchmarks_are_found_by_their_entry_point_or_said_to_be_missing(monkeypatch, capsys, installed):
    declared = PROJECT["entry-points"][bench.GROUP]
    found = [EntryPoint(name, value, bench.GROUP) for name, value in declared.items()] if installed else []
    monkeypatch.setattr(bench, "entry_points", lambda *, group: [each for each in found if each.group == group])
    assert main(["bench", "layer"]) == 2
    assert ("did you mean layers" if installed else "the benchmarks are not installed") in capsys.readouterr().err


def test_a_benchmark_whose_library_is_missing_says_so(monkeypatch, capsys):
    missing = EntryPoint("bench", "no_such_package.program:main", bench.GROUP)
    monkeypatch.setattr(bench, "entry_points", lambda *, group: [missing])
    assert main(["bench", "layers"]) == 2
    assert "No module named 'no_such_package'" in capsys.readouterr().err
