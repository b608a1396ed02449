# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv first and only once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-fast lint bench docs clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "launcher needs Python 3.11 or newer: call make with PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,deepspeed,trackers,dev]'
	@touch $(READY)

demo: $(READY)  ## set-up, then the main job on real data: train, stop, resume, export, answer
	$(BIN)/python -m launcher.demo

test: $(READY)  ## set-up, then every test
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist worksteal

test-fast: $(READY)  ## the default selection, under two minutes
	$(BIN)/python -m pytest

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## every benchmark, as ratios
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/startup.py

docs: $(READY)  ## the pages that are made from the code
	$(BIN)/python -m launcher.recipe.schema._docs > docs/recipe.md

clean:  ## what make made: environment, demo output, caches
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
