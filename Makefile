# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv first and only once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-fast test-matrix gpu-check lint bench docs clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "launcher needs Python 3.11 or newer: call make with PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,deepspeed,ray,kubernetes,trackers,dev]'
	@touch $(READY)

demo: $(READY)  ## set-up, then the main job on real data: train, stop, resume, export, answer
	$(BIN)/python -m launcher.demo

test: $(READY)  ## set-up, then every test
	$(BIN)/python -m pytest -m "not gpu and not matrix" -n 2 --dist worksteal

test-fast: $(READY)  ## the default selection, under two minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-matrix: $(READY)  ## the long forms: every strategy x ranks pair of checkpoints, built DeepSpeed ops; minutes
	$(BIN)/python -m pytest -m matrix -n 2 --dist worksteal

gpu-check:  ## on a GPU machine, with the Python that has torch: kernels, parity, memory, tokens/s; writes gpu-check.json
	$(PYTHON) benchmarks/gpu_check.py --out gpu-check.json

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## every benchmark, as ratios
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/deal.py
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/prepare_memory.py
	$(BIN)/python benchmarks/store_open.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/engine_overhead.py
	$(BIN)/python benchmarks/watch.py
	$(BIN)/python benchmarks/restart.py
	$(BIN)/python benchmarks/faults.py

docs: $(READY)  ## the pages that are made from the code
	$(BIN)/python -m launcher.recipe.schema._docs > docs/recipe.md

clean:  ## what make made: environment, demo output, caches
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
