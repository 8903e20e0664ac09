# Two commands do everything on a machine with make and Python 3.11 or newer:
#   make demo   trains a small Flacuna from scratch: data, tokenizer, base model, LoRA, export, result table
#   make test   installs the test dependencies and runs the test suite

# The newest available version of 3.13, 3.12 and 3.11, including those of pyenv; the newest jax needs 3.12.
PYENV_ROOT ?= $(HOME)/.pyenv
pythons = python$(1) $(wildcard $(PYENV_ROOT)/versions/$(1).*/bin/python3)
running = $(firstword $(foreach name,$(1),$(shell $(name) -c 'import sys; print(sys.executable)' 2>/dev/null)))
ifndef PYTHON
PYTHON := $(call running,$(foreach version,3.13 3.12 3.11,$(call pythons,$(version))) python3)
endif
VENV ?= .venv

# Comparisons with torch run on Python 3.11, the oldest supported version, with its latest jax.
ifndef PARITY_PYTHON
PARITY_PYTHON := $(call running,$(call pythons,3.11))
endif
PARITY_VENV ?= .venv-parity
# This version has CPU builds for 3.11, which the comparisons need. Otherwise pip installs the newest version.
TORCH ?= torch==2.13.0

WHOLE_VENV ?= .venv-whole
WHOLE_TORCH ?= torch
WORKERS ?= 2
# Public sample data (real tokenizer, a small trained LLaMA, Alpaca, ...): tests that need it are skipped without it.
FLACUNA_TEST_DATA ?= $(firstword $(wildcard ../shared/data))
export FLACUNA_TEST_DATA
export JAX_PLATFORMS ?= cpu

BIN = $(VENV)/bin
# The argument is the directory of an interpreter; what to install follows the call, because make splits arguments at
# commas. setuptools warns about every editable install.
editable = PYTHONWARNINGS=ignore $(1)/python -m pip install --quiet --editable
PYTEST = -m pytest -q -n $(WORKERS) --dist loadfile
# Ids of the tests that were skipped on the newest Python.
SKIPPED = $(VENV)/skipped-tests

# SmolLM2-135M-Instruct, a chat model from PyPI: optional data of tests/test_smollm2.py, and the base of `make paper`.
SMOLLM2 ?= .models/smollm2-135m-instruct
SMOLLM2_GGUF = $(dir $(SMOLLM2))SmolLM2-135M-Instruct.Q4_1.gguf

# The size of `make paper`: 10m, 30m, 3h or full. PAPER_OPTIONS are passed on, for example --publish docs.
BUDGET ?= 30m
PAPER_OPTIONS ?=

# Packages and modules whose tests take seconds and need neither torch nor a compiled step, for `make test-quick`.
QUICK = tests/config tests/data tests/logs tests/demo tests/huggingface/files tests/test_architecture.py \
	$(addprefix tests/paper/test_,parts.py stages.py) \
	tests/test_arguments.py tests/test_cli.py tests/test_hub.py tests/test_launchers.py tests/test_source_code.py \
	$(addprefix tests/evaluation/test_,protocol.py scoring.py suite.py tables.py) \
	$(addprefix tests/flan_mini/test_,config.py mixture.py readers.py templates.py) \
	$(addprefix tests/huggingface/test_,answer_ends.py tokenizer.py) tests/kernels/test_packed_mask.py \
	$(addprefix tests/planning/test_,roofline.py targets.py) $(addprefix tests/run/test_,resume.py stop.py) \
	tests/storage/test_run_directory.py $(addprefix tests/training/test_,flops.py guard.py history.py loop.py)

.PHONY: demo paper paper-data test test-all test-quick test-newest test-skipped test-whole smollm2 docs lint types format clean

demo: $(VENV)/.installed
	$(BIN)/python -m flacuna_jax.demo

# The paper's experiment on SmolLM2-135M-Instruct; a stopped one continues. With Python 3.11, PEFT trains beside it.
paper: paper-data $(VENV)/.installed-paper $(SMOLLM2_GGUF) $(if $(PARITY_PYTHON),$(PARITY_VENV)/.installed-parity)
	$(BIN)/python -m flacuna_jax.paper --config configs/paper_135m/$(BUDGET).yaml --base=$(SMOLLM2_GGUF) \
		--data=$(FLACUNA_TEST_DATA) $(if $(PARITY_PYTHON),--peft-python $(PARITY_VENV)/bin/python) $(PAPER_OPTIONS)

paper-data:
	@test -n "$(FLACUNA_TEST_DATA)" || \
		{ echo "make paper needs FLACUNA_TEST_DATA=DIR, with the data that docs/guides/paper.md lists" >&2; exit 2; }

$(SMOLLM2_GGUF): | $(VENV)/bin/python
	$(VENV)/bin/python scripts/fetch_smollm2.py --gguf $(SMOLLM2)

# Runs each test once: first those without torch on the newest Python, then the skipped ones on 3.11 with torch. The
# second part runs even if the first fails.
test: SELECT = -m "not slow"
test-all: SELECT =
test test-all:
	status=0; for part in test-newest test-skipped; do $(MAKE) $$part SELECT='$(SELECT)' || status=1; done; exit $$status

test-quick: $(VENV)/.installed-test
	$(BIN)/python $(PYTEST) -m "not slow" $(QUICK)

test-newest: $(VENV)/.installed-test
	rm -f $(SKIPPED)
	$(BIN)/python $(PYTEST) $(SELECT) --skipped-to=$(SKIPPED)

test-skipped:
ifeq ($(PARITY_PYTHON),)
	@echo "no Python 3.11 here: the comparisons with torch are left out; \`make test-whole\` has them"
else
	test ! -s $(SKIPPED) || $(MAKE) $(PARITY_VENV)/.installed-parity
	test ! -s $(SKIPPED) || { sort -u -o $(SKIPPED) $(SKIPPED) && $(PARITY_VENV)/bin/python $(PYTEST) $(SELECT) @$(SKIPPED); }
endif

# The whole suite with torch on one interpreter: `make test-whole PYTHON=python3.12` (torch's default build is CUDA's).
test-whole: $(WHOLE_VENV)/.installed-whole
	$(WHOLE_VENV)/bin/python $(PYTEST)

# Downloads the model and converts it in the environment of the comparisons with torch.
smollm2: $(PARITY_VENV)/.installed-parity
	$(PARITY_VENV)/bin/python scripts/fetch_smollm2.py $(SMOLLM2)

# The site, in site/: open site/index.html. `make docs DOCS=serve` shows it while its pages are edited.
docs: DOCS ?= build
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(DOCS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python $(WHOLE_VENV)/bin/python:
	$(PYTHON) -m venv $(@:%/bin/python=%)
	$@ -m pip install --quiet --upgrade pip

$(PARITY_VENV)/bin/python:
	$(PARITY_PYTHON) -m venv $(PARITY_VENV)
	$@ -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(call editable,$(BIN)) .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(call editable,$(BIN)) ".[test,compilers,hub,docs]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-paper: pyproject.toml | $(VENV)/bin/python
	$(call editable,$(BIN)) ".[gguf]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	$(call editable,$(BIN)) ".[docs]"
	touch $@ $(VENV)/.installed

# torch first, so that a later resolution does not replace its CPU build.
$(PARITY_VENV)/.installed-parity: pyproject.toml | $(PARITY_VENV)/bin/python
	$(@D)/bin/python -m pip install --quiet "$(TORCH)"
	$(call editable,$(@D)/bin) ".[test,parity,eval,hub]"
	touch $@

$(WHOLE_VENV)/.installed-whole: pyproject.toml | $(WHOLE_VENV)/bin/python
	$(@D)/bin/python -m pip install --quiet "$(WHOLE_TORCH)"
	# XLA writes PTX for the newest CUDA libraries, which are torch's; this is the assembler that reads it.
	$(@D)/bin/python -m pip install --quiet nvidia-cuda-nvcc
	$(call editable,$(@D)/bin) ".[test,compilers,parity,eval,hub]"
	touch $@

clean:
	rm -rf $(VENV) $(PARITY_VENV) $(WHOLE_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
