# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: help setup demo test test-slow check clean

help:
	@echo "make demo       set up, then rows → LoRA → merge → GGUF → evaluation on a small model (about 5 minutes)"
	@echo "make test       set up, then the tests"
	@echo "make test-slow  set up, then whole journeys on the packaged model"
	@echo "make check      set up, then format, lint, types and policy tests"
	@echo "make setup      make $(VENV) with myna in it"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 setup"; exit 4; }
	@echo "setting up $(VENV) (the first time this fetches torch and takes a minute or more)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
	@echo "$(VENV) is ready: $$($(BIN)/myna --version)"

demo: setup
	@echo "running: $(BIN)/myna demo"
	@$(BIN)/myna demo

test: setup
	@echo "running: the tests (make test-slow runs the long ones)"
	@$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	@echo "running: journeys on the packaged model"
	@$(BIN)/python -m pytest -m slow

check: setup
	@scripts/check

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
