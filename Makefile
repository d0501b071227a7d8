# Every target makes its own environment in .venv (see .ci/install). PYTHON=/path/to/python picks the Python for it.

SHELL := /bin/sh
BIN := .venv/bin
DEMO_MODEL := build/demo-model
# Tests run in this many processes; PYTEST_WORKERS=0 runs them in one. PYTEST_ARGS adds arguments of your own.
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
# What is broken most often, and soonest seen: no more than a few programs are compiled, one family goes all the way.
QUICK = tests/test_layout.py tests/test_config.py tests/sharding/test_split.py tests/sharding/test_schedule.py \
	tests/converters/test_matching.py tests/converters/test_safetensors_file.py tests/generation/test_prompts.py \
	tests/generation/test_sampling_params.py tests/kv_cache tests/models/test_llama.py \
	'tests/test_families.py::test_whole_path[llama]'
PYTEST = $(BIN)/pytest --durations=10 $(PYTEST_ARGS)
# Each has its own part of the tests and takes from another's when it is done, so that few modules are set up in two.
WORKERS = -n $(PYTEST_WORKERS) --dist worksteal

# `make gpu-report`: minutes, where the report goes, what more to say (as --tune 5). Where nothing can be installed,
# GPU_PYTHON=python3 names a Python that has all there is to have, this project included, and is used as it is.
MINUTES ?= 8
REPORT ?= build/gpu-report.json
REPORT_ARGS ?=
GPU_PYTHON ?=

export PYTHON

.PHONY: help venv venv-gpu venv-runtime demo test test-quick test-all test-gpu gpu-report gpu-rehearsal lint format clean

help:
	@echo "make demo      convert the embedded checkpoint and generate from it (run-time dependencies only)"
	@echo "make venv      make .venv with everything the tests and the linters need"
	@echo "make test      the tests a machine without a GPU can run, on the CPU"
	@echo "make test-quick  a part of them, in under two minutes: layout, units, one family end to end"
	@echo "make test-all  the same and the slow ones"
	@echo "make test-gpu  the tests that need a GPU, on the GPU"
	@echo "make gpu-report  run those, then measure everything on the GPU, in MINUTES=8; writes REPORT=$(REPORT)"
	@echo "make gpu-rehearsal  the same report without a GPU, to see that all of it works; measures nothing"
	@echo "make lint      ruff and pyright"
	@echo "make format    let ruff rewrite the sources"
	@echo "make clean     remove what was built; .venv stays"

venv:
	@.ci/install test

venv-gpu:
	@.ci/install test,cuda

venv-runtime:
	@.ci/install

demo: venv-runtime
	$(BIN)/jdsi convert examples/tiny-python-lm $(DEMO_MODEL) --to orbax --overwrite
	$(BIN)/jdsi generate $(DEMO_MODEL) --prompt "def " --max-new-tokens 120 --temperature 0.6 --top-p 0.9 --seed 6

# JAX is pinned to the CPU: the CUDA libraries that PyTorch brings must not make it look for a GPU.
test: venv
	JAX_PLATFORMS=cpu $(PYTEST) $(WORKERS)

test-quick: venv
	JAX_PLATFORMS=cpu $(PYTEST) $(WORKERS) $(QUICK)

test-all: venv
	JAX_PLATFORMS=cpu $(PYTEST) $(WORKERS) --slow

test-gpu: venv-gpu
	JDSI_TEST_GPU=1 $(PYTEST) -m gpu

# -P: in a checkout the folder jdsi is not the package.
JDSI = -P -c 'from jdsi.cli import main; main()'

gpu-report: $(if $(GPU_PYTHON),,venv-gpu)
	$(or $(GPU_PYTHON),$(BIN)/python) $(JDSI) bench gpu --minutes $(MINUTES) --output $(REPORT) --tests tests $(REPORT_ARGS)

gpu-rehearsal: venv
	$(BIN)/python $(JDSI) bench gpu --rehearse --output build/gpu-rehearsal.json --overwrite --tests tests

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
