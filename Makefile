# Every target makes .venv if it is missing and installs into it when pyproject.toml or constraints.txt changed.
.PHONY: help install demo test test-slow lint docs clean
.DEFAULT_GOAL := help

BIN := .venv/bin

help:
	@echo "make demo       fit, predict and score on the bundled cells; writes demo/report.html"
	@echo "make test       the tests"
	@echo "make test-slow the tests that take minutes"
	@echo "make lint       style, types, spelling"
	@echo "make docs       the documentation, into site/"
	@echo "make install    only set up .venv"

install: .venv/installed

demo: install
	$(BIN)/invirtuo demo --out demo

test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-slow: install
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m slow tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: .venv/installed-docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs site
	@echo "open site/index.html"

clean:
	rm -rf .venv site demo

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,dev,ray,tune]"
	@touch $@

.venv/installed-docs: pyproject.toml constraints.txt .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

.venv/bin/python:
	@for python in python3 python python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "setting up .venv with $$($$python --version)"; exec $$python -m venv .venv; \
	  fi; \
	done; \
	echo "found no Python >= 3.11 with venv and ensurepip among python3, python, python3.13, python3.12, python3.11;"; \
	echo "install one (on Debian and Ubuntu also the package python3-venv) and run make again"; exit 1
