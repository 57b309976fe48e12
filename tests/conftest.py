"""What many tests need: a seed, a thread setting, and a run of the command line in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from forked import IMPORTS, Command
from noctule.core.fork_server import ForkServer


@pytest.fixture(autouse=True)
def one_seed_and_one_thread():
    """Tests run beside each other: a second thread only where a test asks for it."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def command_server():
    """A process that is forked for each command, so that none waits for its imports."""
    server = ForkServer(*IMPORTS)
    yield server
    server.close()


@pytest.fixture
def noctule_command(tmp_path: Path, command_server: ForkServer):
    """Start ``noctule ARGS`` in ``tmp_path`` without waiting for it.

    `place` are words before it that bring it to its place; `killed` has it kill itself, see `forked.die_at_save`.
    """
    started: list[subprocess.Popen[str] | Command] = []

    def start(
        *args: object, place: Sequence[str] = (), killed: tuple[int, str] | None = None
    ) -> subprocess.Popen[str] | Command:
        words, environment = [*map(str, args)], {**os.environ, "OMP_NUM_THREADS": "1"}
        if not place:
            started.append(Command(command_server, words, tmp_path, environment, killed))
        else:
            words = [*place, sys.executable, "-m", "noctule.cli", *words]
            pipe = subprocess.PIPE
            process = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)
            started.append(process)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
