# Every target does its own set-up in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test soak check bench bench-peers

install: $(INSTALLED)

# The stamp holds the seconds that the installation took; the demo's table shows them.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("isoflop needs Python 3.11 or newer; give one: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV) (about 1.5 GB; one to five minutes)"
	@start=$$(date +%s) && $(PYTHON) -m venv $(VENV) \
	  && $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' \
	  && echo $$(( $$(date +%s) - start )) > $@
	@echo "installed in $$(cat $@) s"

demo: $(INSTALLED)
	@$(BIN)/isoflop demo demo_run --install_seconds $$(cat $(INSTALLED))

test: $(INSTALLED)
	@$(BIN)/python -m pytest -m "not soak"

soak: $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,dedup,cluster]'
	@$(BIN)/python -m pytest -m soak --timeout 2400

check: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_import_contract.py

bench: $(INSTALLED)
	@$(BIN)/python -m tests.benchmarks --output benchmarks.json

bench-peers: $(INSTALLED)
	@$(BIN)/python -m tests.benchmarks --peers --output benchmarks.json
