# make demo   an environment in .venv, the package in it, and the recipe `quick`: report in runs/quick/report.md
# make test   the same environment with the development tools: ruff, mypy, pytest
#
# PYTHON       the interpreter that makes the environment (3.11 or newer)
# TORCH_INDEX  another index for torch, such as https://download.pytorch.org/whl/cpu: on Linux, PyPI's own wheels
#              bring CUDA along, gigabytes that a machine without a GPU has no use for
# PIP_ARGS     further arguments for every pip install

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PIP_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS)

.PHONY: demo test clean

demo: $(VENV)/installed
	$(BIN)/context-pythia compare quick

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
