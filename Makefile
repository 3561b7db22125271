# Everything sets itself up: `make demo` and `make test` need Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Huge pages for what programs allocate: XLA takes new memory for every step, page by page otherwise. Other C libraries
# than glibc 2.35 and newer do not know the name.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help setup demo test test-slow test-goldens test-changed test-subset lint format table clean

PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n auto --dist worksteal

help: ## print the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("attnlab needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

setup: $(READY) ## install everything into .venv

demo: $(READY) ## train and compare attention variants on real data (about 7 minutes on 2 cores)
	$(BIN)/python -m experiments.demo

test: $(READY) lint ## lint, and run the tests that need no accelerator; a mechanism alone: .venv/bin/python -m pytest -k SLUG
	$(PYTEST) -m 'not slow and not goldens and not parity'

test-slow: $(READY) ## the tests that take minutes, and mixers in patterns and layouts that are not the paper's own
	$(PYTEST) -m slow $(LIMIT)

test-goldens: $(READY) ## the golden cases beside this checkout that `test` leaves out, which takes one of each class
	$(PYTEST) -m goldens tests/golden

test-changed: $(READY) ## the tests that depend on the files changed since main; since another commit: make test-changed SINCE=HEAD~3
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.changed $(SINCE)

test-subset: $(READY) ## one mechanism per family and the kernels; with another Python: make test-subset PYTHON=python3.13 VENV=.venv-313
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.subset

lint: $(READY) ## ruff, and mypy over the public API
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

table: $(READY) ## regenerate the README's tables of variants and docs/mechanisms
	JAX_PLATFORMS=cpu $(BIN)/attnlab docs

clean: ## remove the environment and the caches (not what was trained)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
