"""A run's folder: what it stores, what it refuses, and that a refusal touches nothing."""

import json
import os
import sys
import tempfile
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
import torch

from noctule.core.errors import DataError, UsageError
from noctule.report import RunFolder

GIVEN = {"recipe": "sparse_mlp", "options": {"epochs": 3, "data_dir": Path("/data")}, "seed": 7}


def snapshot(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def test_what_was_given_and_what_was_found_are_recorded(tmp_path):
    found = {"threads": 2, "instruction_set": "avx512", "command": ["noctule", "run"]}
    run = RunFolder.create(tmp_path / "a" / "b", **GIVEN, **found)
    about = RunFolder(tmp_path / "a" / "b").about()
    assert about == run.about() == json.loads((tmp_path / "a" / "b" / "run.json").read_text())
    assert about["recipe"] == "sparse_mlp"
    assert about["options"] == {"epochs": 3, "data_dir": "/data"}
    assert (about["seed"], about["threads"], about["instruction_set"]) == (7, 2, "avx512")
    assert about["command"] == ["noctule", "run"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert about["machine"]["cores"] == os.cpu_count()
    assert about["machine"]["cpu"]
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(about["started"])).total_seconds()) < 60


def test_an_empty_folder_is_good_enough_even_after_a_kill_during_create(tmp_path):
    (tmp_path / ".run.json.123-4f.tmp").write_text('{"reci')
    RunFolder.create(tmp_path, **GIVEN)
    assert snapshot(tmp_path).keys() == {"run.json"}


@pytest.mark.parametrize(
    ("make", "named", "word"),
    [
        (lambda p: (p / "run").write_text("mine"), "run", "is a file"),
        (lambda p: (p / "above").write_text("mine"), "above/run", "above"),
        (lambda p: ((p / "run").mkdir(), (p / "run" / "thesis.txt").write_text("mine")), "run", "not empty"),
        (lambda p: RunFolder.create(p / "run", **GIVEN), "run", "--resume"),
        (lambda p: (p / "run").symlink_to(p / "nowhere"), "run", "run"),
    ],
    ids=["a file", "a file above", "other files", "a run", "a dangling link"],
)
def test_what_is_in_the_way_is_refused_and_left_alone(tmp_path, make, named, word):
    make(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=word):
        RunFolder.create(tmp_path / named, **GIVEN)
    assert snapshot(tmp_path) == before


@contextmanager
def unprivileged():
    """Root may write anywhere: in this block, root is nobody."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_an_unwritable_folder_is_refused_and_left_alone(tmp_path):
    RunFolder.create(tmp_path / "good", **GIVEN)  # what it imports is there before root becomes nobody
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        with unprivileged():
            for path in (Path(folder), Path(folder) / "new" / "run"):
                with pytest.raises(UsageError, match="Permission denied"):
                    RunFolder.create(path, **GIVEN)
        assert os.listdir(folder) == []


def test_folders_made_on_the_way_go_when_the_run_cannot_be_written(tmp_path):
    too_long = tmp_path / "new" / ("x" * 300)
    with pytest.raises(UsageError, match="Choose another"):
        RunFolder.create(too_long, **GIVEN)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_only_a_run_opens(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"run\.json"):
        RunFolder(tmp_path / name)


def test_opening_changes_nothing_and_survives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunFolder.create("run", **GIVEN)
    before = snapshot(tmp_path)
    run = RunFolder("run")
    monkeypatch.chdir("/")
    assert run.metrics() == []
    assert run.summary() == {}
    assert run.about()["seed"] == 7
    assert snapshot(tmp_path) == before


def test_a_summary_replaces_the_one_before(tmp_path):
    run = RunFolder.create(tmp_path / "run", **GIVEN)
    run.write_summary({"series": {"sparse": {"test_accuracy": float("nan"), "parameters": torch.tensor(5)}}})
    assert run.summary() == {"series": {"sparse": {"test_accuracy": None, "parameters": 5}}}
    run.write_summary({"series": {}})
    assert RunFolder(run.path).summary() == {"series": {}}
    assert snapshot(run.path).keys() == {"run.json", "summary.json"}


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"\xff\xfe"])
def test_a_damaged_file_is_named(tmp_path, content):
    run = RunFolder.create(tmp_path / "run", **GIVEN)
    (run.path / "summary.json").write_bytes(content)
    with pytest.raises(DataError, match=r"summary\.json"):
        run.summary()
