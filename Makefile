# Two commands do everything on a fresh machine with python3 (3.11 or newer) and make:
#   make demo   builds a small Flacuna from nothing: data, tokenizer, base model, LoRA, export, result table
#   make test   installs the test dependencies and runs the test suite

PYTHON ?= python3
VENV ?= .venv
# The parity tests compare against torch; this version has CPU builds, which is all they need.
TORCH ?= torch==2.13.0
WORKERS ?= 2
# Public sample data (real tokenizer, a small trained LLaMA, Alpaca, ...): tests that need it skip where it is absent.
FLACUNA_TEST_DATA ?= $(firstword $(wildcard ../shared/data))
export FLACUNA_TEST_DATA
export JAX_PLATFORMS ?= cpu

NEWEST_PYTHON ?= $(firstword $(foreach name,python3.12 python3.13 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3), \
    $(shell $(name) -c 'import sys; print(sys.executable)' 2>/dev/null)))
NEWEST_VENV ?= .venv-newest
# What the second interpreter runs, without torch: a run from end to end, and the rooms that lean on jax's newest corners.
NEWEST_TESTS = tests/test_end_to_end.py tests/test_config.py tests/data/test_pipeline.py \
    tests/kernels/test_cross_entropy.py tests/kernels/test_packed_mask.py tests/training/test_checkpoint.py \
    tests/training/test_step_packing.py

BIN = $(VENV)/bin
PYTEST = -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: demo test test-all test-newest lint types format clean

demo: $(VENV)/.installed
	$(BIN)/python -m flacuna_jax.demo

test: $(VENV)/.installed-test test-newest
	$(BIN)/python $(PYTEST) -m "not slow"

test-all: $(VENV)/.installed-test test-newest
	$(BIN)/python $(PYTEST)

# The newest jax needs Python 3.12: where such an interpreter is found, a smaller run of the suite.
test-newest:
ifneq ($(NEWEST_PYTHON),)
	$(MAKE) VENV=$(NEWEST_VENV) PYTHON=$(NEWEST_PYTHON) $(NEWEST_VENV)/.installed-newest
	$(NEWEST_VENV)/bin/python $(PYTEST) -m "not slow" $(NEWEST_TESTS)
else
	@echo "no Python 3.12 or 3.13 here: the run against the newest jax is left out"
endif

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

# torch first: a later resolution must not replace its CPU build.
$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[test,parity,eval,hub]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-newest: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
