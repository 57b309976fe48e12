"""Threads that have nothing to do sleep, and what is small wakes none: each in a process of its own, as torch reads it once."""

import os
import subprocess
import sys

import pytest

from noctule.kernels import native

SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


def run(*words: str, **said: str) -> tuple[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in SAID} | said
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


ASK = """
import os
from noctule.cli.threads import let_threads_sleep
print(let_threads_sleep(), os.environ.get("OMP_WAIT_POLICY"))
"""


def test_they_are_let_sleep_unless_the_environment_says_otherwise_or_it_is_too_late():
    assert run("-c", ASK)[0].split() == ["True", "passive"]
    assert run("-c", ASK, OMP_WAIT_POLICY="active")[0].split() == ["False", "active"]
    assert run("-c", ASK, GOMP_SPINCOUNT="1000")[0].split() == ["False", "None"]
    assert run("-c", f"import torch{ASK}")[0].split() == ["False", "None"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="another OpenMP runtime")
def test_the_runtime_of_a_run_has_heard_of_it(tmp_path):
    words = ["-m", "noctule.cli", "run", "sparse_mlp", "--hidden", "8", "--epochs", "0", "--compare", "none"]
    _, told = run(*words, "--out", str(tmp_path / "run"), OMP_DISPLAY_ENV="true")
    policies = {line.split("=")[1].strip() for line in told.splitlines() if "OMP_WAIT_POLICY" in line}
    assert policies == {"'PASSIVE'"}


def test_doctor_says_how_they_wait():
    words = ["-m", "noctule.cli", "doctor"]
    assert "OMP_WAIT_POLICY=passive, as noctule run does" in run(*words)[0]
    assert "as OMP_WAIT_POLICY=active says" in run(*words, OMP_WAIT_POLICY="active")[0]


PRODUCTS = """
import os
import torch
from noctule import kernels
from noctule.core.topology import Topology

def woken(weights):
    before = len(os.listdir("/proc/self/task"))
    topology = Topology.random((1000, 1000), weights)
    topology.transposed  # torch's own sorting
    values, x, dy = torch.ones(weights), torch.ones(1000, 128), torch.ones(1000, 128)
    torch.set_num_threads(3)
    kernels.spmm(topology, values, x)
    kernels.spmm_t(topology, values, dy)
    kernels.gradients(topology, dy, x, bias=True)
    torch.set_num_threads(1)
    return len(os.listdir("/proc/self/task")) - before

torch.set_num_threads(1)
print(woken(1000), woken(10000))
"""


@pytest.mark.skipif(native._native is None, reason="noctule._native is not built")
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's list of threads")
def test_small_products_wake_no_thread_and_large_ones_wake_all():
    assert run("-c", PRODUCTS)[0].split() == ["0", "2"]
