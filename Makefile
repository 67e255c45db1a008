# Every target sets up what it needs; a fresh machine needs only make and python3 (3.11 or newer).

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN := $(VENV)/bin
PY  := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet install -c constraints.txt

INSTALLED := $(VENV)/.installed
PEER      := .peer/.installed

.DEFAULT_GOAL := help
.PHONY: help demo evidence test lint format parity laws mutants docs gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## run the demonstration (options in ARGS="...")
	$(PY) -m benchmarks.demo $(ARGS)

evidence: $(INSTALLED) ## tables and figures from the committed runs (rerun a row: ARGS="--rerun --methods SOAP")
	$(PY) -m benchmarks.evidence $(or $(ARGS),--report)

test: $(INSTALLED) ## run the tests
	$(PY) -m pytest -n 2 --dist worksteal tests

lint: $(INSTALLED) ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(PY) -m mypy

format: $(INSTALLED) ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

parity: $(INSTALLED) $(PEER) ## compare with the reference implementation, singd 0.0.5
	$(PY) -m benchmarks.parity --peer .peer

laws: $(INSTALLED) ## check the laws of the structures on 100,000 cases (options in ARGS="...")
	$(PY) -m tests.laws $(ARGS)

mutants: $(INSTALLED) ## run the tests on faulty copies of structured/ (1.5 hours; a sample: ARGS="--sample 15")
	$(PY) -m tests.mutants $(ARGS)

docs: $(INSTALLED) ## build the documentation into docs/_build/html
	$(PY) -m sphinx -W --keep-going -b html docs docs/_build/html

# With the torch and Triton that are there, not those of $(VENV), which have no CUDA.
gpu: ## test and measure on an NVIDIA GPU, in nine minutes, into benchmarks/results
	$(PYTHON) -m benchmarks.gpu $(ARGS)

clean: ## remove everything generated, except the virtual environment
	rm -rf .peer build dist benchmarks/out docs/_build docs/_generated docs/api
	rm -rf docs/auto_examples docs/structured/catalogue.rst
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find structured singd tests benchmarks docs -name __pycache__ -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(PY)
	$(PIP) -e ".[dev]"
	@touch $@

# The reference also calls its package singd, so it lives outside the environment.
$(PEER): constraints.txt | $(PY)
	rm -rf .peer
	$(PIP) --no-deps --target .peer singd==0.0.5 einops einconv
	@touch $@
