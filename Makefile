# Everything here works from a fresh clone: each target builds the virtual environment that it needs.
#   PYTHON=...         interpreter of .venv (3.11 or later)
#   ARVIZ1_PYTHON=...  interpreter of .venv-arviz1 (3.12 or later; ArviZ 1.x needs it)
#   ARGS=...           further arguments for pytest, e.g. make test-main ARGS='tests/test_layers.py -k order'

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
ARVIZ1_PYTHON ?= $(shell $(PYTHON) tools/find_python.py 3.13 3.12)
OUT ?= runs/demo
ARGS ?= pyro_contrastive tests

VENV := .venv
VENV1 := .venv-arviz1
DEV := .[test,lint]
# Training to a known answer takes minutes and knows nothing of ArviZ: once is enough.
ARGS1 ?= $(ARGS) -m 'not slow'
# One process per core and one torch thread per process: faster than one process with all cores.
PYTEST := -m pytest --numprocesses 2 --dist worksteal --doctest-modules

# $(call install,venv,interpreter,requirement): shows the large downloads only, errors in full.
define install
@echo "Installing $(3) into $(1) (torch and torchvision are large: two to five minutes the first time)"
@test -x $(1)/bin/python || $(2) -m venv $(1)
@$(1)/bin/python -m pip install --disable-pip-version-check --editable '$(3)' | awk \
	'/Downloading .* [MG]B\)/ { print "  " $$2, $$3, $$4; fflush() } /^Installing collected/ { print "  unpacking"; fflush() }'
@touch $@
endef

.PHONY: help demo test test-main test-arviz1 doctest lint types bench clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## install, fit posteriors on handwritten digits, write runs/demo/report.html
	@$(VENV)/bin/pyro-contrastive demo --out $(OUT)

test: test-main test-arviz1 ## install and run all tests and doctests with ArviZ 0.23, and all but the slow ones with 1.x

test-main: $(VENV)/.installed-dev ## ... on PYTHON only
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) $(ARGS)

test-arviz1: ## ... on Python 3.13 or 3.12 with ArviZ 1.x only, without the tests marked slow
	@interpreter="$(ARVIZ1_PYTHON)"; \
	if [ -z "$$interpreter" ]; then \
		echo "NOT RUN: the tests with ArviZ 1.x. No working Python 3.13 or 3.12 on PATH, in pyenv or beside $(PYTHON);"; \
		echo "         name one with: make test-arviz1 ARVIZ1_PYTHON=/path/to/python3.13"; \
	else \
		$(MAKE) --no-print-directory $(VENV1)/.installed-dev ARVIZ1_PYTHON="$$interpreter"; \
		$(VENV1)/bin/python -c 'from importlib.metadata import version as v; assert v("arviz")[0] != "0", v("arviz")'; \
		set -x; OMP_NUM_THREADS=1 $(VENV1)/bin/python $(PYTEST) $(ARGS1); \
	fi

doctest: $(VENV)/.installed-dev ## run the examples in the docstrings only
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --doctest-modules pyro_contrastive

lint: $(VENV)/.installed-dev ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed-dev ## mypy
	$(VENV)/bin/mypy

bench: $(VENV)/.installed ## speed against peers, as one table of ratios
	$(VENV)/bin/python -m benchmarks --quick

clean: ## remove caches and builds (keeps runs/ and the environments)
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## ... and the virtual environments
	rm -rf $(VENV) $(VENV1)

$(VENV)/.installed: pyproject.toml
	$(call install,$(VENV),$(PYTHON),.)

$(VENV)/.installed-dev: pyproject.toml
	$(call install,$(VENV),$(PYTHON),$(DEV))
	@touch $(VENV)/.installed

$(VENV1)/.installed-dev: pyproject.toml
	$(call install,$(VENV1),$(ARVIZ1_PYTHON),.[test])
