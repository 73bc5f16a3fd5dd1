# Everything runs in .venv, which these targets make. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo smol test test-slow test-gpu gpu test-llama checks format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(STAMP) ## make .venv and install the pinned packages (minutes, once)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## quantize the embedded model to W4A4 and score it against full precision
	$(BIN)/python run.py model=tiny bits=w4a4 method=star_quant paths.results=results/demo

smol: $(STAMP) ## fetch and build the real model of model=smol, into the cache (93 MB, once)
	$(BIN)/python -m starquant.testbed.smol.build

test: $(STAMP) ## run the tests (those marked slow or gpu excepted)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(STAMP) ## run the tests marked slow
	$(BIN)/python -m pytest -n auto -m slow

test-gpu: $(STAMP) ## run the tests marked gpu (a GPU and the extra 'triton')
	$(BIN)/python -m pytest -n auto --dist worksteal -m gpu

gpu: test-gpu ## all that a GPU is needed for: its tests, launch settings, the table of speed and memory
	$(BIN)/starquant tune
	$(BIN)/python run.py experiment=table4_efficiency

test-llama: $(STAMP) ## install llama.cpp (it compiles: a C++ compiler, cmake, minutes) and run the tests of GGUF files
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,llama]'
	$(BIN)/python -m pytest tests/llama_cpp tests/runs/test_gguf_runs.py

checks: $(STAMP) ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and what lies in results/, but for records, published records and the paper's figures
	rm -rf $(VENV)
	find results -mindepth 1 -maxdepth 1 ! -name README.md ! -name paper ! -name published ! -name records -exec rm -rf {} +
