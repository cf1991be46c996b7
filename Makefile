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
# Length of make fuzz: of kernels, and of stores.
FUZZ_SECONDS ?= 300
FUZZ_CASES ?= 1000000
# Processes that share the tests; tests marked timing run alone whatever it is. 0: one process, as for a debugger.
WORKERS ?= logical
# make fast: which Python, and whether the oldest or the newest versions of the dependencies.
DEPENDENCIES ?= newest
FAST_VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-$(DEPENDENCIES)
# Formats, tables and stores: what differs between the versions of anndata, pandas, zarr, NumPy and LanceDB.
FAST := tests/atlas/test_ingest.py tests/atlas/test_ingest_multimodal.py tests/atlas/test_query.py \
  tests/atlas/test_query_dataset.py tests/atlas/test_read_obs.py tests/atlas/test_schema.py tests/atlas/test_write_h5ad.py \
  tests/chromatin/test_regions.py tests/codecs/test_zarr_codec.py tests/scdl/test_convert.py tests/scdl/test_features.py \
  tests/scdl/test_writer.py tests/storage tests/test_cli.py
# What .ci/run runs of them on the newest Python: obs, schemas, MuData and AnnData files, where new versions differed.
NEWEST := tests/atlas/test_read_obs.py tests/atlas/test_schema.py tests/atlas/test_write_h5ad.py \
  tests/atlas/test_ingest_multimodal.py::test_mudata tests/benchmarks/test_compare.py::test_genes_whose_index_is_a_group \
  tests/scdl/test_features.py tests/storage/test_readers.py
# make frameworks: packages that train, on top of $(VENV); constraints.txt has their versions.
FRAMEWORKS_VENV ?= .venv-frameworks
FRAMEWORKS := tests/integrations/test_scvi.py tests/integrations/test_jax.py tests/integrations/test_transformers.py \
  "tests/test_repo.py::test_pages_run[scvi]" "tests/test_repo.py::test_pages_run[frameworks]"
# make rehearse: a CUDA build of torch, and the headers of its CUDA. The versions are those that were rehearsed.
REHEARSE_VENV ?= .venv-rehearse
REHEARSE := torch==2.14.1 nvidia-cuda-crt==13.0.88
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

.PHONY: help demo test long fast frameworks lint typecheck changelog docs bench fuzz races mutants rehearse gpu clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do printf 'make %-10s %s\n' "$$name" "$$text"; done

demo: $(STAMP)  ## ingest, train an epoch, draw throughput; H5AD="a.h5ad b.h5ad" for your own files
	@$(PY) -m hbx_gpu.demo $(H5AD) --out $(DEMO_DIR) $(ARGS)

test: $(STAMP)  ## the whole test suite
	@$(PY) -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

long: $(STAMP)  ## the tests of many random moments and faults, which `make test` leaves out
	@$(PY) -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal -m long $(ARGS)

# Without torch and NVIDIA's packages, of which not every Python has a build of less than some gigabytes.
fast: $(FAST_VENV)/.ready  ## the fast tests, with PYTHON=python3.13 in its own environment; DEPENDENCIES=oldest
	@$(FAST_VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal -m "not slow and not timing" $(FAST) $(ARGS)

frameworks: $(FRAMEWORKS_VENV)/.ready  ## train models of scvi-tools, JAX and transformers, in an environment of their own
	@$(FRAMEWORKS_VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(FRAMEWORKS) $(ARGS)

lint: $(STAMP)  ## ruff, codespell (American spelling), import-linter (which room imports which), the changelog's fragments
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/lint-imports --no-cache
	@$(VENV)/bin/codespell
	@$(VENV)/bin/towncrier build --draft --version next >$(VENV)/changelog.md

changelog: $(STAMP)  ## what the next release changes, from changes/
	@$(VENV)/bin/towncrier build --draft --version next 2>/dev/null

typecheck: $(STAMP)  ## mypy
	@$(PY) -m mypy

docs: $(STAMP)  ## the documentation site, into docs/_build; a warning is an error
	@$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo "docs/_build/index.html"

bench: $(STAMP)  ## cells per second beside an AnnData baseline, with peak memory
	@$(PY) -m benchmarks.throughput $(ARGS)

fuzz: $(STAMP)  ## FUZZ_CASES=1000000 damaged files; corrupt bytes under AddressSanitizer, FUZZ_SECONDS=300
	@$(PY) -m tests.fuzzing --cases $(FUZZ_CASES) $(ARGS)
	@HBX_FUZZ_SECONDS=$(FUZZ_SECONDS) $(PY) -m tests.emulation.sanitized $(ARGS)

races: $(STAMP)  ## kernels under ThreadSanitizer; is each barrier missed where it is missing?
	@$(PY) -m tests.emulation.races $(ARGS)
	@$(PY) -m tests.emulation.races --barriers $(ARGS)

mutants: $(STAMP)  ## does a test notice when the code is wrong? ARGS="--named" or ARGS="hbx_gpu/sampler --count 40 --seed 1"
	@$(PY) -m tests.mutants $(ARGS)

rehearse: $(REHEARSE_VENV)/.ready  ## the tests marked gpu over a stand-in CUDA runtime (7 GB); ARGS="engine"
	@$(REHEARSE_VENV)/bin/python -m tests.rehearsal $(ARGS)

gpu:  ## all that needs an NVIDIA GPU: tests, compute-sanitizer, benchmarks; GPU_PYTHON names the interpreter
	@$(GPU_PYTHON) -m tests.on_gpu $(ARGS)

clean:  ## remove the environment, caches and the demo's output
	rm -rf $(VENV) .venv-* $(DEMO_DIR) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# 1: the interpreter, 2: its environment. An interrupted first run may leave an environment without pip, a system
# upgrade one of another Python.
define environment
	@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hbx_gpu needs Python 3.11 or newer; $(1) is $$($(1) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(2)/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Creating $(2) with $$($(1) --version)"; $(1) -m venv --clear $(2); }
endef

$(FAST_VENV)/.ready: pyproject.toml constraints-oldest.txt
	$(call environment,$(PYTHON),$(FAST_VENV))
	@echo "Installing the $(DEPENDENCIES) dependencies into $(FAST_VENV)"
	@# Of what is installed, the tests import a part; that part is compiled when it is.
	@$(FAST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[test-base]" \
	  $(if $(filter oldest,$(DEPENDENCIES)),-c constraints-oldest.txt)
	@touch $@

# Sees what $(VENV) has, so that little is installed. Frameworks may want other versions than the tests: theirs hide those.
$(FRAMEWORKS_VENV)/.ready: $(STAMP) constraints.txt
	$(call environment,$(PY),$(FRAMEWORKS_VENV))
	@$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  >"$$($(FRAMEWORKS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tests.pth"
	@echo "Installing scvi-tools, JAX and transformers into $(FRAMEWORKS_VENV): about 160 MB"
	@$(FRAMEWORKS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  scvi-tools jax transformers $(CONSTRAINTS)
	@touch $@

$(REHEARSE_VENV)/.ready: pyproject.toml Makefile
	$(call environment,$(PYTHON),$(REHEARSE_VENV))
	@echo "Installing torch with its CUDA libraries into $(REHEARSE_VENV): about 7 GB, some minutes"
	@$(REHEARSE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(REHEARSE) -e ".[test-base]"
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	$(call environment,$(PYTHON),$(VENV))
	@echo "Installing the $(SET) set into $(VENV); the first time takes a few minutes"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e "$(REQUIREMENT)" $(CONSTRAINTS)
	@touch $@
