# Every target makes its own environment in .venv (see .ci/install). PYTHON=/path/to/python picks the Python for it.

SHELL := /bin/sh
BIN := .venv/bin
DEMO_MODEL := build/demo-model
# Tests run in this many processes; PYTEST_WORKERS=0 runs them in one. PYTEST_ARGS adds arguments of your own.
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
PYTEST = $(BIN)/pytest --durations=10 $(PYTEST_ARGS)
# Each has its own part of the tests and takes from another's when it is done, so that few modules are set up in two.
WORKERS = -n $(PYTEST_WORKERS) --dist worksteal

export PYTHON

.PHONY: help venv venv-runtime demo test test-all test-gpu lint format clean

help:
	@echo "make demo      convert the embedded checkpoint and generate from it (run-time dependencies only)"
	@echo "make venv      make .venv with everything the tests and the linters need"
	@echo "make test      the tests a machine without a GPU can run, on the CPU"
	@echo "make test-all  the same and the slow ones"
	@echo "make test-gpu  the tests that need a GPU, on the GPU"
	@echo "make lint      ruff and pyright"
	@echo "make format    let ruff rewrite the sources"
	@echo "make clean     remove what was built; .venv stays"

venv:
	@.ci/install test

venv-runtime:
	@.ci/install

demo: venv-runtime
	$(BIN)/jdsi convert examples/tiny-python-lm $(DEMO_MODEL) --to orbax --overwrite
	$(BIN)/jdsi generate $(DEMO_MODEL) --prompt "def " --max-new-tokens 120 --temperature 0.6 --top-p 0.9 --seed 6

# JAX is pinned to the CPU: the CUDA libraries that PyTorch brings must not make it look for a GPU.
test: venv
	JAX_PLATFORMS=cpu $(PYTEST) $(WORKERS)

test-all: venv
	JAX_PLATFORMS=cpu $(PYTEST) $(WORKERS) --slow

test-gpu: venv
	JDSI_TEST_GPU=1 $(PYTEST) -m gpu

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/typecheck

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .jax_cache .pytest_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
