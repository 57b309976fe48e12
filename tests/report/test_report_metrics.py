"""The metrics file: what is logged is read back, whatever killed the process that logged it."""

import errno
import math
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import law

from noctule.core.errors import DataError, NoctuleError
from noctule.report import files, metrics

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


@law
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=4))
def test_what_is_logged_is_read_back_with_null_for_what_is_not_finite(records):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        for record in records:
            assert metrics.append(path, record) == finite(record)
        assert metrics.read(path) == [finite(record) for record in records]


@settings(law, max_examples=60)
@given(st.data())
def test_cut_anywhere_the_whole_lines_stay_and_the_next_one_follows_them(data):
    records = [{"epoch": epoch, "series": "späte\n„Reihe“", "loss": 1 / epoch} for epoch in range(1, 5)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        ends = [0]
        for record in records:
            metrics.append(path, record)
            ends.append(path.stat().st_size)
        cut = data.draw(st.integers(0, ends[-1]))
        with open(path, "r+b") as file:
            file.truncate(cut)
        whole = records[: sum(end <= cut for end in ends[1:])]
        assert metrics.read(path) == whole
        metrics.append(path, {"epoch": 99})
        assert metrics.read(path) == [*whole, {"epoch": 99}]


FOREVER = """
import sys
from pathlib import Path
from noctule.report import metrics
for epoch in range(10**9):
    metrics.append(Path(sys.argv[1]), {"epoch": epoch, "text": "x" * 20_000})
"""


def test_a_killed_writer_leaves_every_line_before_the_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", FOREVER, str(path)], env={"PYTHONPATH": ":".join(sys.path)})
    try:
        while writer.poll() is None and (not path.exists() or path.stat().st_size < 3_000_000):
            time.sleep(0.005)
    finally:
        writer.kill()
    assert writer.wait(timeout=30) == -signal.SIGKILL
    found = [record["epoch"] for record in metrics.read(path)]
    assert len(found) >= 149
    assert found == list(range(len(found)))
    metrics.append(path, {"epoch": -1})
    assert [record["epoch"] for record in metrics.read(path)] == [*found, -1]


@contextmanager
def files_at_most(size):
    """Let no file of this process grow past a size, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_says_so_and_loses_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, {"epoch": 1})
    with files_at_most(path.stat().st_size + 5), pytest.raises(NoctuleError, match=r"metrics\.jsonl.*room"):
        metrics.append(path, {"epoch": 2})
    assert metrics.read(path) == [{"epoch": 1}]
    metrics.append(path, {"epoch": 2})
    assert metrics.read(path) == [{"epoch": 1}, {"epoch": 2}]


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "summary.json"
    files.replace(path, b"old")
    with files_at_most(5), pytest.raises(NoctuleError, match=r"summary\.json"):
        files.replace(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


@pytest.fixture
def calls(monkeypatch):
    """The calls of os.fsync and os.replace in their order; `calls.fails` makes the sync of a folder raise."""

    class Calls(list):
        fails = None

    made, replace = Calls(), os.replace

    def fsync(handle):
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        made.append("sync folder" if folder else f"sync {os.fstat(handle).st_size} bytes")
        if folder and made.fails:
            raise OSError(made.fails, os.strerror(made.fails))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (made.append("replace"), replace(*paths)))
    return made


def test_content_is_on_the_disk_before_its_name_is(tmp_path, calls):
    files.replace(tmp_path / "summary.json", b"123")
    assert calls == ["sync 3 bytes", "replace", "sync folder"]


def test_a_folder_that_cannot_be_synced_is_no_error_but_a_broken_disk_is(tmp_path, calls):
    calls.fails = errno.EINVAL
    files.replace(tmp_path / "summary.json", b"123")
    calls.fails = errno.EIO
    with pytest.raises(NoctuleError, match=r"summary\.json"):
        files.replace(tmp_path / "summary.json", b"456")


def test_a_run_folder_that_vanished_is_not_made_again(tmp_path):
    with pytest.raises(NoctuleError, match="gone"):
        files.replace(tmp_path / "gone" / "summary.json", b"123")
    assert not (tmp_path / "gone").exists()


def test_a_folder_that_vanished_is_named(tmp_path):
    with pytest.raises(NoctuleError, match="gone"):
        metrics.append(tmp_path / "gone" / "metrics.jsonl", {})


def test_rewriting_keeps_the_kept_lines_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "x": 0.10}\n\n{"step":2}\n{"step": 3}\n{"ste')
    metrics.rewrite(path, lambda record: record["step"] != 2)
    assert path.read_bytes() == b'{"step": 1, "x": 0.10}\n{"step": 3}\n'


def test_a_rewrite_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, {"epoch": 1})
    with pytest.raises(KeyError):
        metrics.rewrite(path, lambda record: record["absent"])
    assert metrics.read(path) == [{"epoch": 1}]
    metrics.rewrite(tmp_path / "none.jsonl", lambda record: True)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_line_that_is_no_object_is_named_by_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": NaN}\n[1]\n{"a": 1}\n')
    with pytest.raises(DataError, match="Line 2"):
        metrics.read(path)
    path.write_bytes(b'{"a": NaN}\n')
    assert metrics.read(path) == [{"a": None}]


def test_numbers_of_numpy_and_torch_are_numbers():
    given = {"a": np.float32(0.5), "b": torch.tensor(float("inf")), "c": np.int64(3), "d": (np.array(2.0), Path)}
    assert files.plain(given, other=lambda value: "?") == {"a": 0.5, "b": None, "c": 3, "d": [2.0, "?"]}


@pytest.mark.parametrize("record", [{"a": object()}, {"a": torch.zeros(2)}, ["a"], "a", None])
def test_what_is_not_a_record_is_refused_and_nothing_is_written(tmp_path, record):
    with pytest.raises(ValueError, match=r"dict|JSON"):
        metrics.append(tmp_path / "metrics.jsonl", record)
    assert list(tmp_path.iterdir()) == []
