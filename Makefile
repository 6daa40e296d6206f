# People and CI run the same targets. Each works as the first command after a clone: it sets the environment up itself.

PYTHON ?= python3
DEVICE ?= cuda
BIN := .venv/bin
READY := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint type fmt docs bench gpu clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  %-9s %s\n", $$1, $$2 }'

setup: $(READY)  ## make .venv and install Esper with its development tools

# On Linux, PyPI's torch is the CUDA build (gigabytes). For the CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Esper needs Python 3.11 or newer, as $(PYTHON): install one, or name it with make PYTHON=python3.12 setup." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[dev,docs]' -c constraints.txt
	@touch $@

demo: $(READY)  ## the whole story in minutes on a laptop
	$(BIN)/python pipelines/demo.py

# Tests start a hundred processes, which share what Python compiled, wherever that is off.
test test-all: export PYTHONDONTWRITEBYTECODE =

# Three at once, for many wait for Ray or MLflow to start. Neighbours, which share a Ray or a server, are in one process;
# the longest files begin (tests/conftest.py).
test: $(READY)  ## all tests but the slow ones; those for a GPU show as skipped without one
	$(BIN)/python -m pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

test-all: $(READY)  ## all tests, one after another
	ESPER_TEST_ALL=1 $(BIN)/python -m pytest

lint: $(READY)  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(READY)  ## check types
	$(BIN)/pyright

fmt: $(READY)  ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## build the documentation's site into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(READY)  ## measure speed, about seven minutes on an idle machine: the table of docs/performance.md
	@$(BIN)/python benchmarks/run.py

gpu: $(READY)  ## check and time everything on an NVIDIA GPU in six minutes; DEVICE=cpu rehearses it
	$(BIN)/python benchmarks/gpu.py --device $(DEVICE)

clean:  ## remove caches and build products; .venv, runs and mlflow.db stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
