# Ten targets or fewer; each is what a person types and what .ci/run calls.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv

.DEFAULT_GOAL := help
.PHONY: help env demo test lint type bench docs clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

env: $(VENV)/.ready ## create .venv with everything, from uv.lock

$(VENV)/.ready: pyproject.toml uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it with PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "Python's venv is missing: install python3-venv"; exit 1; }
	@command -v cc >/dev/null || \
		{ echo "A C compiler is missing (libp2p builds one wheel): install gcc and python3-dev"; exit 1; }
	@echo '#include <gmp.h>' | cc -E - >/dev/null 2>&1 || \
		{ echo "GMP headers are missing (libp2p builds one wheel): install libgmp-dev"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(UV) || $(BIN)/python -m pip install --quiet 'uv>=0.9'
	$(UV) sync --frozen --all-extras --inexact --compile-bytecode --quiet
	@# libp2p brings trio-typing, whose obsolete stubs hide trio's own types from mypy.
	@rm -rf $(VENV)/lib/python3*/site-packages/trio-stubs
	@touch $@

demo: env ## the main job, end to end, on this machine
	@$(BIN)/lumaris demo $(if $(INPUT),--input $(INPUT))

test: env ## every test; what needs an absent engine is skipped and says so
	@$(BIN)/python -m pytest $(ARGS)

lint: env ## style and import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache

type: env ## mypy, strict
	@$(BIN)/mypy

bench: env ## every benchmark, as a table (JSON=1 for JSON)
	@for file in benchmarks/*.py; do $(BIN)/python $$file $(if $(JSON),--json); done

docs: env ## regenerate the tables in docs/ from the code
	@$(BIN)/python docs/generate.py

clean: ## remove the environment and caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
