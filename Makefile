# Two commands matter: `make demo` and `make test`. The first command that needs it builds $(VENV).
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
# Files to ingest instead of generated data: make demo H5AD="a.h5ad b.h5ad"
H5AD ?=
# Where the demo writes its data, atlas and picture.
DEMO_DIR ?= demo
# Length of make fuzz.
FUZZ_SECONDS ?= 300
# What make gpu runs with: numpy, cupy, torch and pytest are enough, the rest is skipped and said.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))
# Passed on: make demo ARGS="--epochs 3", make test ARGS="-k atlas", make bench ARGS="--cells 50000"
ARGS ?=

# cpu or gpu; found out from the NVIDIA driver unless given.
SET ?= $(shell if [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; then echo gpu; else echo cpu; fi)
SET := $(strip $(SET))
ifeq ($(SET),gpu)
REQUIREMENT := .[gpu,test]
CONSTRAINTS :=
else ifeq ($(SET),cpu)
REQUIREMENT := .[test]
CONSTRAINTS := -c constraints.txt
else
$(error SET is '$(SET)'; expected cpu or gpu)
endif

PY := $(VENV)/bin/python
# Named by the set, so that a machine that gains a driver installs what it lacks.
STAMP := $(VENV)/.ready-$(SET)

.PHONY: help demo test lint typecheck bench fuzz gpu clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do printf 'make %-10s %s\n' "$$name" "$$text"; done

demo: $(STAMP)  ## ingest, train an epoch, draw throughput; H5AD="a.h5ad b.h5ad" for your own files
	@$(PY) -m hbx_gpu.demo $(H5AD) --out $(DEMO_DIR) $(ARGS)

test: $(STAMP)  ## the whole test suite
	@$(PY) -m pytest $(ARGS)

lint: $(STAMP)  ## ruff: rules and formatting; import-linter: which room may import which
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/lint-imports --no-cache

typecheck: $(STAMP)  ## mypy
	@$(PY) -m mypy

bench: $(STAMP)  ## cells per second beside an AnnData baseline, with peak memory
	@$(PY) -m benchmarks.throughput $(ARGS)

fuzz: $(STAMP)  ## corrupt bytes against the kernels under AddressSanitizer, FUZZ_SECONDS=300
	@HBX_FUZZ_SECONDS=$(FUZZ_SECONDS) $(PY) -m tests.emulation.sanitized $(ARGS)

gpu:  ## all that needs an NVIDIA GPU: tests, compute-sanitizer, benchmarks; GPU_PYTHON names the interpreter
	@$(GPU_PYTHON) -m tests.on_gpu $(ARGS)

clean:  ## remove the environment, caches and the demo's output
	rm -rf $(VENV) $(DEMO_DIR) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hbx_gpu needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@# An interrupted first run may leave an environment without pip behind, a system upgrade one of another Python.
	@$(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing the $(SET) set into $(VENV); the first time takes a few minutes"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e "$(REQUIREMENT)" $(CONSTRAINTS)
	@touch $@
