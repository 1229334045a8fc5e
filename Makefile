# Every target does all its own set-up, in .venv, under the versions of constraints.txt. What is installed is recorded by
# stamp files in .venv, so a second run starts at once and calls pip only after pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
STAMP  := $(VENV)/.installed-
PINNED := pyproject.toml constraints.txt
comma  := ,

# $(call install,EXTRAS,STAMPS): the package in place with some extras; STAMPS are the smaller sets that this contains.
# The build back-end is the pinned one of the environment, so nothing unpinned is fetched.
define install
	$(PIP) install -c constraints.txt --no-build-isolation -e '.$(1)'
	@touch $(addprefix $(STAMP),$(2)) $@
endef

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint docs bench clean

help: ## this list
	@echo "PantaRhei: learn, straighten, sample and read flows"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Another interpreter: make demo PYTHON=python3.12"

demo: $(STAMP)core ## train a flow on digits, straighten it, and write runs/quickstart/report.html
	$(BIN)/pantarhei quickstart --out runs/quickstart

# Two threads in all: first the tests that start two processes themselves, then two workers of one thread each.
# (pytest's exit status 5 means that no test was selected.)
test: $(STAMP)test ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m distributed || [ $$? -eq 5 ]
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not distributed" -n 2 --dist loadfile

lint: $(STAMP)lint ## check style, types and the rooms' imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

bench: $(STAMP)bench ## compare speed with named peers (installs them)
	@set -e; \
	if [ -f benchmarks/run.py ]; then $(BIN)/python benchmarks/run.py; \
	else for file in $$(grep -l '__name__ == "__main__"' benchmarks/*.py); do $(BIN)/python "$$file"; done; fi

clean: ## remove what was built, except .venv and runs/
	rm -rf build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name .venv -prune -o -name runs -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(STAMP)venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "Python 3.11 or newer is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch is by far the largest download: a step of its own, which a change of pyproject.toml does not repeat.
$(STAMP)torch: $(STAMP)venv constraints.txt
	$(PIP) install -c constraints.txt setuptools torch
	@touch $@

$(STAMP)core: $(STAMP)torch $(PINNED)
	$(call install)

$(STAMP)test: $(STAMP)torch $(PINNED)
	$(call install,[test],core)

$(STAMP)lint: $(STAMP)torch $(PINNED)
	$(call install,[lint$(comma)test],core test)

$(STAMP)docs: $(STAMP)torch $(PINNED)
	$(call install,[docs],core)

# The peers come without their dependencies: the compared parts need nothing that the bench extra does not bring.
$(STAMP)bench: $(STAMP)torch $(PINNED) benchmarks/requirements.txt
	$(PIP) install --no-deps -r benchmarks/requirements.txt
	$(call install,[bench],core)
