"""How the compiled module lives with torch, each case in a process of its own."""

import os
import subprocess
import sys

import pytest

from noctule.kernels import native

needs_native = pytest.mark.skipif(native._native is None, reason="noctule._native is not built")


def run(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WORK = """
import torch, warnings
from noctule import kernels
from noctule.core.topology import Topology
torch.set_num_threads(2)
a = torch.randn(600, 600)
(a @ a).sum()
(a * a + a).sum()
topology = Topology.random((600, 600), 36000)
y, _ = kernels.spmm(topology, torch.ones(36000), a)
assert torch.isfinite(y).all()
(a @ a).sum()
"""

RUNTIMES = """
runtimes = set()
for line in open("/proc/self/maps"):
    path = line.split(maxsplit=5)[5].strip() if len(line.split(maxsplit=5)) > 5 else ""
    if any(name in path.rsplit("/", 1)[-1] for name in ("libgomp", "libomp", "libiomp")):
        runtimes.add(path)
print(len(runtimes), *sorted(runtimes))
"""


@needs_native
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks at the mappings of a Linux process")
@pytest.mark.parametrize("first", ["import torch", "import noctule._native"])
def test_one_openmp_runtime_whoever_comes_first(first):
    other = {"import torch": "import noctule._native", "import noctule._native": "import torch"}[first]
    assert run(f"{first}\n{other}\n{WORK}\n{RUNTIMES}").split()[0] == "1"


@needs_native
def test_the_module_needs_nothing_of_python():
    code = (
        "import sys; before = set(sys.modules); import noctule._native as native;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "assert 'torch' not in new and 'numpy' not in new, new;"
        "print(native.instruction_set() == native.instruction_sets()[0])"
    )
    assert run(code) == "True"


WITHOUT = """
import sys, warnings
sys.modules["noctule._native"] = None
import torch
from noctule import SparseLinear, attach, gse
from noctule.kernels import native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torch.manual_seed(0)
    model = torch.nn.Sequential(SparseLinear(20, 30, density=0.3), torch.nn.ReLU(), SparseLinear(30, 2, density=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(64, 20)
    y = (x[:, 0] > 0).long()
    losses = []
    with attach(model, optimizer, gse(every=5)) as session:
        for _ in range(30):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    assert native.instruction_set() == "none"
    assert sum("noctule._native is missing" in str(w.message) for w in caught) == 1, caught
    print("trained")
"""


def test_without_it_layers_train_in_plain_torch_and_say_so_once():
    assert run(WITHOUT) == "trained"
