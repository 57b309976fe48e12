"""Each example runs, and prints what its reader is to see."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "own_loop": r"dense\n +301,066 weights +9\d\.\d%(?s:.*)\n +16,036 weights +9\d\.\d%",
    "hugging_face": r"epoch 4: loss 0\.[0-5](?s:.*)the outputs are the same",
    "parameter_server": r"worker 1: staleness(?s:.*)9\d\.\d% right",
    "scikit_learn": r"density 0\.2 +9\d\.\d%(?s:.*)the best one: 9\d\.\d% of the test set right",
    "own_method": r"plain: loss 0\.[01](?s:.*)centralised: loss 0\.[01]",
}


@pytest.mark.parametrize("name", SAYS)
def test_example_runs_and_shows_its_point(name, capsys):
    if name == "parameter_server":
        pytest.importorskip("zmq")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(SAYS[name], printed), printed


def test_two_workers_run_under_torchrun():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(EXAMPLES / "two_workers.py")], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"ms a step, loss (\S+)", done.stdout)]
    assert len(losses) == 2
    assert losses == pytest.approx([0.35, 0.35], abs=0.1)


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAYS, "two_workers"}
