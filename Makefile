# make help lists the targets. Each sets up what it needs on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/digits
# a file's tests share what they prepare, so a file goes to one process
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile
export DS_ACCELERATOR ?= cpu
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: help setup demo demo-crash test test-slow check bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP)  ## virtual environment with pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first: deepspeed's build imports it, and an unpinned torch would bring gigabytes of CUDA
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel numpy torch
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,pii,names,presidio,gliner,ray,tokenizers]'
	touch $(STAMP)

demo: $(STAMP)  ## the main job on embedded data: two ranks on the CPU, into runs/digits
	$(BIN)/python scripts/launch.py configs/digits --nproc 2 --run-dir $(RUN)

demo-crash: $(STAMP)  ## a short demo with four faults injected: two kills, a flipped bit, a SIGTERM; into runs/crash
	$(BIN)/python scripts/demo_crash.py --nproc 2

test: $(STAMP)  ## the tests (under 15 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL)

test-slow: $(STAMP)  ## the heavier matrices too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) -m 'not gpu'

check: $(STAMP)  ## ruff, pyright and the import arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: $(STAMP)  ## the measurements of this machine
	$(BIN)/python scripts/bench.py dp
	$(BIN)/python scripts/bench.py train

clean:  ## runs and caches; the environment stays
	rm -rf runs .pytest_cache .ruff_cache .hypothesis
