# make run and make test need Python 3.10 or later, pip and make; the rest is installed into .venv.
# Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
# Of the tests: one per core, but not more than fit into a laptop's memory.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
MODEL ?= llama_3_1_8b
OUT ?= runs/gpu

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
EDITABLE := -e
TORCH := $(shell grep '^torch==' constraints.txt)

# Two threads on a busy machine make small tensor operations slower, not faster.
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help run test lint bench native interpreted gpu clean
.DELETE_ON_ERROR:

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 18

run: $(VENV)/.base  ## compare all policies on the built-in workload: a table and a figure
	@$(BIN)/coserve compare

test: lint  ## ruff, mypy and all tests that need no GPU
	$(BIN)/python -m pytest -q -n $(WORKERS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy $(wildcard sim engine profiles analysis hydra_plugins)

bench: $(VENV)/.test  ## how fast the simulator is, as a table; benchmarks that need a GPU run by hand
	$(BIN)/python tests/benchmarks/iterations.py

native: $(VENV)/.base  ## build the simulator's inner loop as machine code, 2.9 times as fast; needs a C compiler
	@$(PIP_INSTALL) $(EDITABLE) '.[native]'
	@$(BIN)/python -m sim.native build

interpreted: $(BIN)/python  ## remove what make native built
	@$(BIN)/python -m sim.native remove

# Also without an environment of its own: python3 -m profiles.session OUT, with what that Python has.
gpu: $(VENV)/.test  ## measure everything on this machine's GPU: make gpu MODEL=llama_3_1_8b OUT=runs/gpu
	$(BIN)/python -m profiles.session $(OUT) $(if $(DEVICE),--device $(DEVICE)) --model $(MODEL)

clean:  ## remove .venv and caches; runs and data stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Where Python comes without ensurepip, its own pip fills the environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "coserve needs Python 3.10 or later; try: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV) && \
		$(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $@ install --quiet pip; }

$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing coserve into $(VENV)"
	@$(PIP_INSTALL) $(EDITABLE) .
	@touch $@

# torch first and by its exact version: left to the second step, it would be resolved anew.
$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing coserve with engine and test tools into $(VENV)"
	@$(PIP_INSTALL) $(TORCH)
	@$(PIP_INSTALL) $(EDITABLE) '.[engine,test]'
	@touch $@ $(VENV)/.base
