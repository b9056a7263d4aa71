# make demo   an environment in .venv, the package in it, and the recipe `quick`: report in runs/quick/report.html
# make test   the same environment with the development tools: ruff, mypy, pytest
# make test-hosts     transformers' own tests of a model, on ours; and checkpoints that ship their code, read elsewhere
# make test-versions  the tests of model, cache, generation and conversion on the oldest and the newest transformers
# make test-serving   the tests of the vLLM plug-in, in .venv-serving with vLLM's build for CPUs
# make test-wheel     wheel and sdist in dist/, and the wheel in an environment of its own, with the newest packages
#
# PYTHON       the interpreter that makes the environment (3.11 or newer)
# TORCH_INDEX  another index for torch, such as https://download.pytorch.org/whl/cpu: on Linux, PyPI's own wheels
#              bring CUDA along, gigabytes that a machine without a GPU has no use for
# PIP_ARGS     further arguments for every pip install
# PYTEST_ARGS  arguments for pytest: a process per core

PYTHON ?= python3
VENV ?= .venv
SERVING ?= .venv-serving
TORCH_INDEX ?=
PIP_ARGS ?=
PYTEST_ARGS ?= -n auto

BIN := $(VENV)/bin
# pip compiles nothing, because most of these files are never imported. Who imports one first compiles it for all.
export PYTHONDONTWRITEBYTECODE :=
PIP := -m pip install --quiet --no-compile $(PIP_ARGS)
PIP_INSTALL = $(BIN)/python $(PIP) --constraint constraints.txt

# Versions of transformers: the one that is installed, and those at the ends of what pyproject.toml allows.
PINNED := $(shell sed -n 's/^transformers==//p' constraints.txt)
ENDS := 5.16.1 5.24.0
# What the oldest needs in other versions than ours.
OLDER := huggingface-hub==1.31.0 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 anyio==4.16.0 idna==3.20 certifi
# What a change of transformers can break: model, cache, generation, training, loading and saving. Arithmetic, messages
# and bookkeeping of our own need no second version.
ON_EACH := $(addprefix tests/model/test_,generation.py cache.py modeling.py positions.py heads.py token_ids.py quantized.py \
	weights_elsewhere.py configuration.py) tests/conversion/test_transplant.py \
	$(addprefix tests/evaluation/test_,pretrained.py quantized.py) $(addprefix tests/runs/test_,convert.py generate.py) \
	-k "not interrupted and not went_wrong"

.PHONY: demo test test-hosts test-versions $(ENDS:%=test-%) test-serving test-wheel clean

demo: $(VENV)/installed
	$(BIN)/context-pythia compare quick

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PYTEST_ARGS) --ignore tests/hosts

test-hosts: $(VENV)/transformers-$(PINNED) $(ENDS:%=$(VENV)/overlays/%)
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/hosts

test-versions: $(ENDS:%=test-%)

$(ENDS:%=test-%): test-%: $(VENV)/overlays/%
	PYTHONPATH=$$PWD/$< $(BIN)/python -m pytest $(PYTEST_ARGS) $(ON_EACH)

test-serving: $(SERVING)/installed
	$(SERVING)/bin/python -m pytest $(PYTEST_ARGS) tests/serving

# No resolving: it would bring torchvision and the like, built for CUDA (tests/serving/requirements.txt).
$(SERVING)/installed: pyproject.toml tests/serving/requirements.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python $(PIP) --no-deps \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --requirement tests/serving/requirements.txt
	$(SERVING)/bin/python $(PIP) --no-deps --editable .
	touch $@

# No constraints here: a user has none.
test-wheel: $(VENV)/installed-dev
	rm -rf dist $(VENV)/wheel
	$(BIN)/python -m hatchling build
	$(PYTHON) -m venv $(VENV)/wheel
	$(VENV)/wheel/bin/python $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
		"$$(grep "^torch==" constraints.txt)"
	$(VENV)/wheel/bin/python $(PIP) dist/*.whl
	cd $(VENV)/wheel && bin/context-pythia --help && bin/context-pythia compare --models Pythia,shared --samples 100 --epochs 1 --quiet
	$(VENV)/wheel/bin/context-pythia report $(VENV)/wheel/runs/quick --lang ja

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

# A wheel has no tests.
$(VENV)/transformers-$(PINNED): $(VENV)/installed-dev
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --dest $(VENV)/sdist $(PIP_ARGS) \
		transformers==$(PINNED)
	tar -xzf $(VENV)/sdist/transformers-$(PINNED).tar.gz -C $(VENV) transformers-$(PINNED)/tests
	touch $@

# Laid before the installed packages by PYTHONPATH.
$(VENV)/overlays/%: $(VENV)/installed-dev
	$(BIN)/python $(PIP) --no-deps --target $@.partial transformers==$* \
		$(if $(filter 5.16.1,$*),$(OLDER))
	rm -rf $@ && mv $@.partial $@ && touch $@

clean:
	rm -rf $(VENV) $(SERVING) dist .mypy_cache .pytest_cache .ruff_cache
