#!/usr/bin/env bash
# Build the wheel of noctule-runtime, install it into an environment with numpy alone, and run a shipped file there.
# $1 is a python that has noctule and the tools to build.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$(realpath -s "${1:-.venv/bin/python}")"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" ./runtime
"$python" - "$folder" <<'PYTHON'
import sys

import numpy
import torch

import noctule
from noctule.deploy.noctule_file import write_model
from noctule.models import mlp

torch.manual_seed(0)
model = noctule.convert_(mlp(784, 300, 10), noctule.ToSparse(density=0.1)).model.eval()
x = torch.rand(5, 784)
write_model(model, x, __import__("pathlib").Path(sys.argv[1]) / "model.noctule")
numpy.save(f"{sys.argv[1]}/x.npy", x.numpy())
with torch.no_grad():
    numpy.save(f"{sys.argv[1]}/expected.npy", model(x).numpy())
PYTHON
"$python" -m venv "$folder/bare"
cd "$folder"
unset PYTHONPATH
bare/bin/python -m pip install --quiet noctule_runtime-*.whl
bare/bin/python -m noctule.runtime model.noctule x.npy y.npy
bare/bin/python - <<'PYTHON'
import importlib.metadata
import sys

import noctule.runtime
import numpy

numpy.testing.assert_allclose(numpy.load("y.npy"), numpy.load("expected.npy"), atol=1e-5)
names = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
assert names <= {"noctule-runtime", "numpy", "pip", "setuptools"}, names
assert "torch" not in sys.modules
PYTHON
echo "noctule-runtime works beside numpy alone: $(basename noctule_runtime-*.whl), $(du -k noctule_runtime-*.whl | cut -f1) kB"
