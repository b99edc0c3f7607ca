# Everything here runs on a fresh machine with Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CODE ?= teach
PARAMS ?=
NOTEBOOKS := notebooks/0[1-9]_*[a-z].ipynb

.PHONY: help setup report pdf notebooks test bench lab clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-11s %s\n", $$1, $$2}' Makefile
	@echo
	@echo 'make report PARAMS="-p EPOCHS 50 -p 03.N 3000"   other parameters,'
	@echo '                               in all notebooks or in one of them'
	@echo 'make report CODE=all           with all the code; CODE=none: without'

setup: .venv/.ready  ## the environment alone

.venv/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, \
	found " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

report: setup  ## execute the notebooks, then report.pdf and report.html
	$(BIN)/python -m report --code $(CODE) --execute $(PARAMS)

pdf: setup  ## the same from the notebooks as saved, in seconds
	$(BIN)/python -m report --code $(CODE)

notebooks: setup  ## execute the notebooks in place, for committing
	RUNS=$$(mktemp -d) && export RUNS && trap 'rm -rf "$$RUNS"' EXIT && \
		$(BIN)/jupyter nbconvert --config jupyter_config.py \
		--to notebook --execute --inplace $(NOTEBOOKS)

test: setup  ## style, unit tests, and the notebooks as tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder \
		tests/test_notebooks.py tests  # the longest first
	sh tests/notebooks.sh

bench: .venv-bench/.ready  ## measure against other libraries
	.venv-bench/bin/python benchmarks/run.py

.venv-bench/.ready: requirements.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet \
		--disable-pip-version-check -r benchmarks/requirements.txt
	touch $@

lab: setup  ## open Jupyter, the modules beside the notebooks
	$(BIN)/jupyter lab --config jupyter_config.py

clean:  ## remove the environments, the report and what was remembered
	rm -rf .venv .venv-bench build *.egg-info runs \
		report/report.pdf report/report.html
