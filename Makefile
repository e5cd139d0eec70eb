# Everything starts here: each target sets up what it needs, on a machine with python3 (3.11 or newer), make and git.

PYTHON ?= python3
VENV ?= .venv
# Test processes side by side; 0 runs the tests in one process, which is what a debugger wants.
WORKERS ?= 2
# More arguments for pytest or the trained experiment, as in `make test ARGS="tests/moe -k top_k"`.
ARGS ?=
CONFIG ?= configs/quickstart.py
WORKDIR ?= runs/quickstart
STUDIES ?= runs/studies

BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install dev train test test-all lint format results bench plan-all notebooks clean distclean

test test-all: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV)/.installed  ## set up, then train CONFIG (the quickstart) in WORKDIR
	$(BIN)/python experiments/train.py --config=$(CONFIG) --workdir=$(WORKDIR) $(ARGS)

test: $(VENV)/.installed-dev  ## set up, then run every test that is not marked slow
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-test-all  ## run the slow tests as well (the compiler for GPUs: 1 GB more)
	$(PYTEST) $(ARGS)

lint: $(VENV)/.installed-dev  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

results: $(VENV)/.installed  ## run what is missing of all toy studies (hours), write docs/results.md
	$(BIN)/python experiments/results.py --workdir=$(STUDIES) $(ARGS)

bench: $(VENV)/.installed  ## measure, on this machine
	$(BIN)/python experiments/bench.py $(ARGS)

plan-all: $(VENV)/.installed-tpu-plan  ## compile what is missing of all published models for their slices (hours), print tables
	$(BIN)/python experiments/plan_all.py $(ARGS)

notebooks: $(VENV)/.installed-dev  ## sync colab/*.ipynb with the Python files beside them, then run them all
	cd colab && $(abspath $(BIN))/jupytext --quiet --sync *.py
	$(BIN)/python -m pytest -m "slow or not slow" tests/colab $(ARGS)

install: $(VENV)/.installed  ## set up for running
dev: $(VENV)/.installed-dev  ## set up for running, testing and linting

clean:  ## remove caches and build products; runs and the environment stay
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find $(wildcard sparse_lm experiments configs tests) -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## remove the environment as well
	rm -rf $(VENV)

# The stamps are renewed when the metadata changes; editable, so that a change of the sources needs no installation.
$(VENV)/.installed: setup.py pyproject.toml | $(VENV)/.created
	@echo "Installing sparse_lm into $(VENV) (some 0.8 GB with its dependencies; some minutes the first time) ..."
	$(PIP_INSTALL) .
	@touch $@

$(VENV)/.installed-dev: setup.py pyproject.toml | $(VENV)/.created
	@echo "Installing sparse_lm and its development tools into $(VENV) (some minutes the first time) ..."
	$(PIP_INSTALL) ".[dev]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-test-all: setup.py pyproject.toml | $(VENV)/.created
	@echo "Installing sparse_lm, its development tools and the compiler for GPUs into $(VENV) ..."
	$(PIP_INSTALL) ".[dev,gpu-plan]"
	@touch $@ $(VENV)/.installed-dev $(VENV)/.installed

$(VENV)/.installed-tpu-plan: setup.py pyproject.toml | $(VENV)/.created
	@echo "Installing sparse_lm and the compiler for TPUs into $(VENV) (0.7 GB more) ..."
	$(PIP_INSTALL) ".[tpu-plan]"
	@touch $@ $(VENV)/.installed

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) is not on the PATH; name a Python of 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), 3.11 or newer is needed: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments (no ensurepip or venv module);" \
	    "on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "Creating $(VENV) ..." && $(PYTHON) -m venv $(VENV); }
	@touch $@
