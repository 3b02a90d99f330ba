# Every target makes the environment that it needs: Python (3.10 to 3.13) and make are enough.
VENV ?= .venv
JOBS ?= 2
PIP_FLAGS ?=
ARGS ?=
DATA ?= ../shared/data

# The first interpreter on the path that the package supports.
PYTHON ?= $(shell for p in python3 python python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help:  ## Say what there is to make.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

.PHONY: demo
demo: $(VENV)/.demo  ## Train, prune, compact, prove and save a network on handwritten digits (ARGS="..." is passed on).
	$(BIN)/secateur train $(ARGS)

.PHONY: test
test: $(VENV)/.dev  ## Run the tests and the examples in docstrings (ARGS="..." is passed on).
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

.PHONY: test-slow
test-slow: $(VENV)/.dev  ## Run the tests that train for minutes.
	$(BIN)/python -m pytest -q -m slow $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.dev  ## Make N random networks, cut them, and compare (N=2000 by default; SECATEUR_FUZZ_SEED for others).
	SECATEUR_FUZZ=$(or $(N),2000) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) tests/test_fuzz.py

.PHONY: zoo
zoo: $(VENV)/.zoo  ## Trace, cut and prove every architecture of the zoo, and write docs/zoo.md (ARGS="..." is passed on).
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zoo.py $(ARGS)

# The methods of the minimum table first, then all.
.PHONY: reproduce
reproduce: $(VENV)/.dev  ## Train the papers' experiments (days; killed runs go on), and write docs/results.md (DATA=folder).
	OMP_NUM_THREADS=1 $(BIN)/secateur reproduce mnist-mlp --data-dir $(DATA)/mnist $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/secateur reproduce mnist-lenet5 --data-dir $(DATA)/mnist --method hard-concrete --method arm $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/secateur reproduce mnist-lenet5 --data-dir $(DATA)/mnist $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/secateur reproduce cifar-resnet20 --data-dir $(DATA)/cifar10 $(ARGS)
	$(BIN)/secateur reproduce --report

.PHONY: check
check: format-check lint types test  ## Format, lint, types and tests, changing nothing.

.PHONY: format
format: $(VENV)/.dev  ## Write the format, and the fixes that the linter is sure of.
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

.PHONY: format-check
format-check: $(VENV)/.dev  ## Compare the format.
	$(BIN)/ruff format --check .

.PHONY: lint
lint: $(VENV)/.dev  ## Run the linter.
	$(BIN)/ruff check .

.PHONY: types
types: $(VENV)/.dev  ## Run the type checker.
	$(BIN)/mypy

.PHONY: clean
clean:  ## Remove the environment and the tools' caches.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Secateur needs Python 3.10 to 3.13; none was found on the path. Say which: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamps: an environment is brought up to date when what it is built from has changed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.demo

$(VENV)/.zoo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[dev,zoo]"
	@touch $@ $(VENV)/.dev $(VENV)/.demo
