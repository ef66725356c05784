# Each target makes the environment that it needs: .venv, installed once and reused until its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: study lab test suites lint format clean

study: $(VENV)/.study
	$(BIN)/python -m benchmarks study

lab: $(VENV)/.study
	$(BIN)/python -m benchmarks lab

# Each file of tests in one process, several files at once.
test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses=logical --maxprocesses=8 --dist=loadfile

# Other projects' tests, where SUITES is a folder that has them; see CONTRIBUTING.md.
SUITES ?= suites

suites: $(VENV)/.suites
	$(BIN)/python tests/suites/run.py $(SUITES) --out benchmarks/results/suites

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV)

# torch goes first and alone, so that the constraint decides which build every later step finds.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "curvlib needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	touch $@

$(VENV)/.study: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[study]'
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,study]'
	touch $@

$(VENV)/.suites: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[suites]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
