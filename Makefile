# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ORACLE := .venv-oracle

.PHONY: help setup demo test test-slow test-oracle check clean

help:
	@echo "make demo       set up, then rows → LoRA → merge → GGUF → evaluation on a small model (about 5 minutes)"
	@echo "make test       set up, then the tests"
	@echo "make test-slow  set up, then whole journeys on the packaged model"
	@echo "make test-oracle  set up, build llama.cpp from source, then compare our files with its tools' (about 20 minutes)"
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
	@$(BIN)/python -m pytest -m "not slow and not oracle"

test-slow: setup
	@echo "running: journeys on the packaged model"
	@$(BIN)/python -m pytest -m "slow and not oracle"

test-oracle: setup $(ORACLE)/.ready
	@echo "running: our files against those of llama.cpp's own tools"
	@MYNA_ORACLE_PYTHON=$(CURDIR)/$(ORACLE)/bin/python MYNA_CONVERTER_PYTHON=$(CURDIR)/$(ORACLE)/bin/python \
		$(BIN)/python -m pytest -m oracle

# The packages of the extra `oracle` alone, since what they pin need not be what myna runs with.
$(ORACLE)/.ready: pyproject.toml $(VENV)/.ready
	@echo "setting up $(ORACLE) (needs a C++ compiler: llama-cpp-python is built from source)"
	@test -x $(ORACLE)/bin/python || $(PYTHON) -m venv $(ORACLE)
	@$(ORACLE)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["oracle"], sep="\n")' > $(ORACLE)/requirements.txt
	@$(ORACLE)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(ORACLE)/requirements.txt
	@touch $@

check: setup
	@scripts/check

clean:
	rm -rf $(VENV) $(ORACLE) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
