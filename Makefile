# Two commands on a fresh machine: `make demo` trains, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The exact torch, first: a plain `torch` would bring gigabytes of CUDA where the CPU build is meant.
TORCH ?= torch==2.13.0

.PHONY: demo test test-slow test-tools test-triton check docs figures bench bench-env clean

demo: $(VENV)/installed
	$(BIN)/noctule run sparse_mlp --data digits --epochs 100

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What takes long: wider products of cases, more examples, more kills, bounds for a quiet machine.
test-slow: $(VENV)/installed
	NOCTULE_TESTS=full $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or wide"

# The tests with other people's tools (Trainer, accelerate, Lightning, peft), which `make test` skips where they are missing.
test-tools: $(VENV)/tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/tools

# The kernels for CUDA, under Triton's interpreter, which needs no GPU.
test-triton: $(VENV)/triton
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/kernels/test_kernels_triton.py

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check src tests examples docs/*.py
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_public.py
	tests/wheel.sh $(BIN)/python
	tests/runtime_wheel.sh $(BIN)/python

# The site, in build/site: pages of docs/ and the API from docstrings. A broken link is an error.
docs: $(VENV)/docs
	$(BIN)/zensical build --strict --clean

# The pictures of the pages, from the logs of the benchmarks and from the imports of the sources.
figures: $(VENV)/installed
	$(BIN)/noctule bench figure --log benchmarks/results/layers.jsonl --out docs/figures/step.svg
	$(BIN)/python docs/folders.py

bench: bench-env
	$(BIN)/noctule bench layers
	$(BIN)/noctule bench fashion
	$(BIN)/noctule bench memory
	$(BIN)/noctule bench accuracy

# The peers that the benchmarks compare with; nothing else needs them.
bench-env: $(VENV)/installed
	$(BIN)/python -m pip install --quiet pybind11 setuptools wheel scipy
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[bench]"

$(VENV)/installed: pyproject.toml CMakeLists.txt $(wildcard cpp/* cpp/runtime/*)
	$(PYTHON) -c 'import sys; sys.exit("Noctule needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.10" "nanobind>=2.4" cmake ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable . --group dev
	touch $@

$(VENV)/tools: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group tools
	touch $@

$(VENV)/triton: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group triton
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

clean:
	rm -rf $(VENV) build dist src/noctule/_native*.so src/noctule/runtime/_native*.so
