#!/usr/bin/env bash
# Build a wheel, install it into an environment that knows nothing of the sources, and use it there.
# The environment borrows torch and the other libraries from that of $1 (a python), whose own noctule it must not see.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$(realpath -s "${1:-.venv/bin/python}")"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" .
"$python" -m venv --without-pip "$folder/bare"
"$python" -m pip --python "$folder/bare/bin/python" install --quiet --no-deps --no-index "$folder"/noctule-*.whl
site="$("$folder/bare/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/borrowed.pth"  # its own .pth files, such as that of an editable install, are not read
cd "$folder"
unset PYTHONPATH
export OMP_NUM_THREADS=1

bare/bin/noctule --version
bare/bin/noctule bench --help > benchmarks.txt
grep -q "layers .*nn.Linear" benchmarks.txt
bare/bin/python - "$folder" <<'PYTHON'
import sys

import noctule
import noctule._native as native
import noctule_bench
import torch

assert noctule.__file__.startswith(sys.argv[1]), noctule.__file__
assert native.__file__.startswith(sys.argv[1]), native.__file__
assert noctule_bench.__file__.startswith(sys.argv[1]), noctule_bench.__file__
layer = noctule.SparseLinear(64, 32, density=0.1, bias=False)
x = torch.randn(128, 64)
torch.testing.assert_close(layer(x), x @ layer.to_dense().weight.T)
PYTHON
bare/bin/noctule run sparse_mlp --data digits --epochs 1 --out run > run.txt 2>&1 || { cat run.txt; exit 1; }
test -s run/report.html
echo "the wheel works: $(basename noctule-*.whl), $(du -k noctule-*.whl | cut -f1) kB"
