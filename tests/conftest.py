"""What many tests need: a seed, a thread setting, and a run of the command line in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def one_seed_and_one_thread():
    """Tests run beside each other: a second thread only where a test asks for it."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def noctule_command(tmp_path: Path):
    """Start ``noctule ARGS`` in ``tmp_path`` without waiting for it, behind the words that bring it to its place, if any."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: object, place: Sequence[str] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*place, sys.executable, "-m", "noctule.cli", *map(str, args)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
