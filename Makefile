# `make help` lists the targets. Every target that needs the environment builds it first.
#   make test PY=python           use the active environment (conda, a container) instead of .venv
#   make setup PYTHON=python3.12  build .venv with another interpreter
#   make setup PIP_ARGS="..."     pass arguments to pip, e.g. an index with CPU-only wheels of torch
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup docs pages demo demo-full demo-tuned smollm2 smollm2-rivals audit audit-deps claims report tables table1 table2 table3 table4 \
  table5 table6 test test-slow fuzz mutants bench lint clean

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
VENV := .venv
PY ?= $(VENV)/bin/python
# An interpreter named on the command line is taken as it is; only our own .venv is built.
ENV := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.stamp)
# Two single-threaded runs beat one run on two threads, and one thread keeps sums in one order.
SINGLE := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# One single-threaded worker a core; a file stays with one worker, which its fixtures were made for.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(ENV) ## create .venv and install the project (again only after pyproject.toml changed)

$(VENV)/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' is missing or older than Python 3.10 ($$($(PYTHON) --version 2>&1 | tail -n 1))."; \
	  echo "      Remedy: make setup PYTHON=/path/to/python3.10-or-newer"; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: '$(PYTHON) -m venv' failed. Remedy: install the venv module (Debian: apt-get install python3-venv)."; exit 1; }
	$(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -e '.[dev]'
	@touch $@
	@echo "make: $(VENV) holds the project; source $(VENV)/bin/activate for the commands of README.md, make demo for a first campaign"

demo: $(ENV) ## the demo campaign on the embedded model, its table and its figures (minutes on 2 cores)
	$(SINGLE) $(PY) train.py -m experiment=demo $(ARGS) || echo "make: some runs failed; the table names them" >&2
	$(PY) -m analysis.demo --experiment demo --runs runs --out results/local/demo $(ARGS)

demo-full: $(ENV) ## a larger grid of the same
	$(SINGLE) $(PY) train.py -m experiment=demo_full $(ARGS) || echo "make: some runs failed; the table names them" >&2
	$(PY) -m analysis.demo --experiment demo_full --runs runs --out results/local/demo_full $(ARGS)

demo-tuned: $(ENV) ## every method at the values its search chose (conf/chosen/tuned)
	$(SINGLE) $(PY) train.py -m experiment=demo_tuned $(ARGS) || echo "make: some runs failed; the table names them" >&2
	$(PY) -m analysis.demo --experiment demo_tuned --runs runs --out results/local/demo_tuned $(ARGS)

smollm2: $(ENV) ## the campaign on SmolLM2-135M with real SST-2 and AdvBench (hours on 2 cores)
	$(SINGLE) $(PY) train.py -m experiment=smollm2 $(ARGS) || echo "make: some runs failed; the table names them" >&2
	$(PY) -m analysis.demo --experiment smollm2 --runs runs --out results/local/smollm2 $(ARGS)

audit: $(ENV) ## check the paper's own numbers; writes analysis/AUDIT.md
	$(PY) -m analysis.audit

table1 table2 table3 table4 table5 table6: $(ENV)
	$(PY) -m analysis.paper_tables $@ --runs runs --out results/local/$@ $(ARGS)

tables: $(ENV) ## Tables 1 to 6 from finished runs (or one: make table3 ARGS="model=tiny task=toy_sentiment")
	failed=; for t in 1 2 3 4 5 6; do \
	  $(PY) -m analysis.paper_tables table$$t --runs runs --out results/local/table$$t $(ARGS) || failed="$$failed table$$t"; done; \
	test -z "$$failed" || { echo "make: incomplete or without runs:$$failed" >&2; exit 1; }

audit-deps: $(ENV) ## check the installed packages for known vulnerabilities (pip-audit; needs PyPI)
	$(PY) -m pip_audit --skip-editable

claims: $(ENV) ## what an exported campaign says about the paper's claims (ARGS="--results results/demo" by default)
	$(PY) -m analysis.claims $(or $(ARGS),--results results/demo)

smollm2-rivals: $(ENV) ## the paper's baselines in the same setting, p = 0.1 (an hour on 2 cores)
	$(SINGLE) $(PY) train.py -m experiment=smollm2_rivals $(ARGS) || echo "make: some runs failed; the table names them" >&2
	$(PY) -m analysis.demo --experiment smollm2_rivals --runs runs --out results/local/smollm2_rivals $(ARGS)

report: $(ENV) ## one page of runs/, or of an exported campaign: make report ARGS="--exported results/demo"
	$(PY) -m analysis.report --out results/local/report.html $(ARGS)

docs: $(ENV) ## the site, from docs/ into build/site/index.html; fails for a broken link or reference
	$(PY) -c 'import mkdocs, material, mkdocstrings_handlers.python' 2>/dev/null || \
	  $(PY) -m pip install --disable-pip-version-check -q $(PIP_ARGS) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --clean $(ARGS)

pages: $(ENV) ## the generated numbers of README.md and docs/, from the exported campaigns
	$(PY) -m analysis.pages $(ARGS)

test: $(ENV) ## the default tests: CPU, offline, minutes
	$(SINGLE) $(PY) -m pytest $(PARALLEL) $(ARGS)

test-slow: $(ENV) ## the slow tests too
	$(SINGLE) $(PY) -m pytest -m "not gpu" $(PARALLEL) $(ARGS)

fuzz: $(ENV) ## random combinations of options on the embedded model (CWAC_FUZZ=500 of them, one a second)
	CWAC_FUZZ=$(or $(CWAC_FUZZ),500) $(SINGLE) $(PY) -m pytest tests/test_fuzz.py -n 0 -q $(ARGS)

mutants: $(ENV) ## mutation testing (mutmut; hours; ARGS="analysis.stats*" TESTS=test_stats: some; SAMPLE=40 ARGS=MODULE: a sample)
	$(PY) -m pip install --disable-pip-version-check -q $(PIP_ARGS) -e '.[mutants]'
	$(if $(TESTS),PYTEST_ADDOPTS='-k "$(TESTS)"') $(SINGLE) $(PY) tests/run_mutants.py $(if $(SAMPLE),--size $(SAMPLE)) $(ARGS)

bench: $(ENV) ## what things cost beside their rivals (half an hour; ARGS="constraint sae": some of it)
	$(SINGLE) $(PY) -m benchmarks $(ARGS)

lint: $(ENV) ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean: ## delete caches of Python and the tools; runs, artifacts, results and .venv stay
	find . \( -path ./$(VENV) -o -path ./.git -o -path ./runs -o -path ./artifacts -o -path ./results \) -prune -o \
	  -type d \( -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache \) -print0 | xargs -0 -r rm -rf
