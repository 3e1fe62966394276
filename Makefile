# Two commands on a bare machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# A process a core, and one thread in each: two thread pools on two cores are slower than none.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile
EXTRAS := train,audit,web,native,tracing,tensorrt-rtx,tensorrt-rtx-provider,s3,dev

.PHONY: demo test setup check test-all gpu bench serve
setup: .venv/installed
.venv/installed: pyproject.toml constraints.txt hatch_build.py $(wildcard protos/*/*.proto protos/*/*/*.proto)
	@echo "installing into .venv: 5 GB, a few minutes"
	$(PYTHON) -m venv .venv || { echo "on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

# KServe's client: its messages have the names of ours and of Triton's, and clash with them in one environment.
.venv-kserve/installed: tests/kserve/requirements.txt
	$(PYTHON) -m venv .venv-kserve
	.venv-kserve/bin/pip install --quiet --requirement $<
	touch $@

demo: setup
	$(BIN)/tenet demo

test: setup .venv-kserve/installed
	$(PYTEST) -m 'not slow and not gpu'

check: setup
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

test-all: setup .venv-kserve/installed
	$(PYTEST) -m 'not gpu'

# All tests and benchmarks that need a GPU; the results lie in gpu-results.
gpu: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" benchmarks/gpu.sh gpu-results

bench: setup
	for name in startup batching engines export_time int8_ends tenet_cost audit; do $(BIN)/python benchmarks/$$name.py || exit 1; done

serve: setup
	$(BIN)/tenet serve --repository models
