# Every target sets up .venv by itself, once: it is made anew only when one of the three files below changes.

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
SPREAD = -n $(WORKERS) --dist worksteal

BIN := .venv/bin
READY := .venv/.ready
OLDER := .venv/transformers4
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup test test-transformers4 test-slow test-lowest demo lint format typecheck clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)$$/\1	\2/p' Makefile | expand -t 12

setup: $(READY)  ## create .venv with everything that the other targets need

# torch comes first and by itself, so that the build which is at hand (CUDA or CPU) stays whatever comes after it.
$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"found: Python {v[0]}.{v[1]}; wanted: 3.10 or later; remedy: make PYTHON=/path/to/python")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

test: $(READY)  ## run all tests but those marked slow
	$(BIN)/pytest $(SPREAD) $(PYTEST_ARGS)

# Beside the packages of .venv, and in front of them on the path.
$(OLDER)/.ready: $(READY) tests/integrations/alibi/transformers4.txt
	rm -rf $(OLDER)
	$(BIN)/pip install --quiet --no-deps --target $(OLDER) --requirement tests/integrations/alibi/transformers4.txt
	@touch $@

test-transformers4: $(OLDER)/.ready  ## run the tests of language models on the older transformers, 4.57
	PYTHONPATH=$(OLDER) $(BIN)/pytest $(SPREAD) tests/integrations/alibi tests/integrations/t5

test-slow: $(READY)  ## run all tests, slow ones too; meant for a machine with a GPU
	$(BIN)/pytest $(SPREAD) -m "slow or not slow" $(PYTEST_ARGS)

# The lower bounds of setup.cfg, turned into pins. pip takes a torch of that version as it finds it, most likely with CUDA.
test-lowest:  ## run the tests on the lowest versions that setup.cfg allows, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	sed -nE 's/^(.*[ =])?([a-z][a-z-]*)>=([0-9.]+).*/\2==\3/p' setup.cfg > .venv-lowest/constraints.txt
	.venv-lowest/bin/pip install --quiet --constraint .venv-lowest/constraints.txt --editable '.[test]'
	.venv-lowest/bin/pytest $(SPREAD) $(PYTEST_ARGS)

demo: $(READY)  ## train a small SwinV2, run it stock and patched, compare; leaves demo.csv and demo.png
	$(BIN)/flashbias demo

lint: $(READY)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Types are checked on the package as it is installed: in the repository no folder is called flashbias.
typecheck: $(READY)  ## check types on the built wheel
	rm -rf .typecheck build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target .typecheck .
	MYPYPATH=.typecheck $(BIN)/mypy -p flashbias

clean:  ## remove .venv and all that was built
	rm -rf .venv .venv-lowest .typecheck .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
