# Everything here runs on a fresh machine with Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
CODE ?= 1
PARAMS ?=
BUILD := $(BIN)/python report/build.py $(if $(filter 0,$(CODE)),--no-code)

.PHONY: help setup report pdf notebooks test mutants bench lab clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12
	@echo
	@echo 'make report PARAMS="-p EPOCHS 50 -p SEEDS 2"   other hyperparameters'
	@echo 'make report CODE=0                             without the code'

setup: .venv/.ready  ## the environment alone

.venv/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, \
	found " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-r requirements.txt
	touch $@

report: setup  ## execute the notebooks, then report.pdf and report.html
	$(BUILD) --execute $(PARAMS)

pdf: setup  ## the same from the notebooks as saved, in seconds
	$(BUILD)

notebooks: setup  ## execute the notebooks in place, for committing
	$(BIN)/python report/build.py --in-place

test: setup  ## style, unit tests, and the notebooks as tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest
	sh tests/notebooks.sh

mutants: setup  ## break helpers.py on purpose; each break must be noticed
	$(BIN)/python tests/mutants.py

bench: .venv-bench/.ready  ## measure against other libraries
	.venv-bench/bin/python benchmarks/run.py

.venv-bench/.ready: requirements.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet \
		--disable-pip-version-check -r benchmarks/requirements.txt
	touch $@

lab: setup  ## open Jupyter
	$(BIN)/jupyter lab notebooks

clean:  ## remove the environments and the report
	rm -rf .venv .venv-bench report/report.pdf report/report.html
