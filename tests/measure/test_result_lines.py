import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from noctule.measure import Timing, footprint, machine, measure, ratio, result_line
from noctule.measure.results import _commit


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_line_says_what_was_measured_and_where():
    with measure() as cost:
        pass
    timing = Timing((1.0, 3.0))
    line = result_line(
        "layers",
        density=0.05,
        bad=float("nan"),
        scalar=np.float32(2),
        tensor=torch.tensor(3),
        shape=(2, 3),
        none=None,
        timing=timing,
        ratio=ratio(timing, timing),
        cost=cost,
        memory=footprint(nn.ReLU()),
    )
    assert "\n" not in line
    found = json.loads(line, parse_constant=pytest.fail)
    assert found["name"] == "layers"
    assert [found[key] for key in ("density", "bad", "scalar", "tensor", "shape", "none")] == [
        0.05,
        None,
        2,
        3,
        [2, 3],
        None,
    ]
    assert found["timing"]["median_seconds"] == 2
    assert found["ratio"]["ratio"] == 1
    assert found["cost"]["multiply_adds"] == 0
    assert found["memory"]["total_bytes"] == 0
    assert found["machine"].keys() == machine().keys() >= {"cpu", "cores", "torch", "threads", "commit", "load_average"}


def test_the_names_of_the_line_itself_are_taken():
    with pytest.raises(ValueError, match="machine"):
        result_line("layers", machine="mine")


def test_the_machine_is_this_one():
    found = machine()
    assert found["torch"] == torch.__version__
    assert found["cores"] >= 1
    assert found["cpu"]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert machine()["threads"] == 1
    finally:
        torch.set_num_threads(threads)


def test_the_commit_is_that_of_the_file(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("1")
    assert _commit(file) is None, "in no repository"
    git(tmp_path, "init", "-q")
    assert _commit(file) is None, "not tracked"
    git(tmp_path, "add", "a.py")
    assert _commit(file) is None, "no commit yet"
    git(tmp_path, "commit", "-qm", "x")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert head.startswith(_commit(file))
    (tmp_path / "other").write_text("2")
    assert head.startswith(_commit(file)), "files that are not tracked change nothing"
    file.write_text("2")
    assert _commit(file).endswith("-dirty")
    assert _commit(Path("/proc/self/status")) is None
