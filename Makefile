# Every target sets up what it needs in .venv, does nothing twice, and may be called in any order.
#   make PYTHON=python3.12 demo     another interpreter (3.11 or newer)
#   make PIP_FLAGS=... demo         flags for pip: a mirror, a wheel folder, another index

PYTHON ?= python3
PIP_FLAGS ?=
JOBS ?= 2

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check fmt docs-figures clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/demo.stamp ## draw and edit with the embedded model; the pictures land in demo/
	$(BIN)/python -m fluxloom demo --out demo

test: .venv/test.stamp ## run all tests; core/ and infer/ must stay covered to 95 %
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --cov --cov-report=term

check: .venv/dev.stamp ## style, types, layering and size budgets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/test_house.py

fmt: .venv/dev.stamp ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs-figures: .venv/demo.stamp ## draw the pictures of README.md and docs/editing.md anew
	$(BIN)/python -m fluxloom demo --out demo --sheet docs/images/sheet.webp
	$(BIN)/python bench/editing_figures.py docs/images

clean: ## remove the environment, caches and build products; pictures in demo/ stay
	rm -rf .venv build dist .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fluxloom needs Python 3.11 or newer, got " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/demo.stamp: EXTRAS :=
.venv/test.stamp: EXTRAS := [test]
.venv/dev.stamp: EXTRAS := [dev]
.venv/%.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.$(EXTRAS)'
	@touch $@
