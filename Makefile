.DEFAULT_GOAL := help
SHELL := bash
VENV := .venv
PYTHON := $(VENV)/bin/python
# A folder of wheels, for example torch's CPU build, may be given to pip by PIP_FIND_LINKS; uv reads its own variable.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
PYTEST := $(PYTHON) -m pytest
# Byte-code of our own modules is kept, or each of the hundreds of processes that the tests start would compile it.
unexport PYTHONDONTWRITEBYTECODE

help:  ## this list
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(VENV)/.installed  ## a virtual environment with everything in it, versions as in constraints.txt
$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt uv
	VIRTUAL_ENV=$(VENV) $(VENV)/bin/uv pip install --quiet --compile-bytecode --constraint constraints.txt --editable '.[operator,trainer,dev]'
	touch $@

demo: setup  ## the main job: train, adapt and generate on this machine (examples/quickstart)
	examples/quickstart/run.sh

test: setup  ## unit, operator and trainer tests; what needs a cluster or takes minutes is named at the end
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

gpu: setup  ## what only a GPU can tell: jobs of every task and method on one, with figures as JSON; skipped without one
	$(PYTEST) -s -n 0 tests/gpu

lint: setup  ## ruff (format and rules), mypy, import contracts, generated files
	$(PYTHON) -m luthier_api.drawn --check
	$(PYTHON) docs/render.py --check
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

generate: setup  ## write the CRDs, and the tables of docs, from the code
	$(PYTHON) -m luthier_api.drawn
	$(PYTHON) docs/render.py
	$(PYTHON) docs/memory_tables.py

cluster: setup  ## a real Kubernetes with JobSet on this machine (CLUSTER=kind for kind, KUBECONFIG for yours)
	$(PYTHON) tests/cluster/cluster.py ensure

images: setup  ## both images, where the cluster finds them
	$(PYTHON) tests/cluster/cluster.py image . operator luthier/operator:dev
	$(PYTHON) tests/cluster/cluster.py image . trainer luthier/trainer:dev

e2e: setup  ## the slow tests, whole examples by `luthier run` among them, then API and end-to-end tests on the cluster, through helm and kubectl
	$(PYTEST) -n 2 --dist loadfile -m slow
	$(PYTEST) tests/cluster tests/e2e

bench: setup  ## the figures of docs/benchmarks.md, as JSON
	PYTHONPATH=tests $(PYTHON) -m perf

exactness: setup  ## outputs equal to the bit, for all architectures, samplers and 31 kills, as JSON (20 minutes)
	PYTHONPATH=tests $(PYTHON) -m perf exactness

.PHONY: help setup demo test lint generate cluster images e2e bench exactness gpu
