# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PACKAGES := datamerge merge_service storage_schemas trainer benchmarks docs experiments tests
# Tests that use the larger data sets are skipped, and say so, where DATAMERGE_DATA is not set.
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help demo test test-floors test-floors-all dist slow check lint format docs pictures clean experiments-small bench gpu gpu-wheels

help:
	@echo "make demo    merge, train and evaluate on real digits (a few minutes)"
	@echo "make test    run the tests"
	@echo "make test-floors  read, check and convert artifacts with the oldest dependencies that pyproject.toml allows"
	@echo "make test-floors-all  run the tests with the oldest dependencies of the extras, torch 2.6 among them (3 GB)"
	@echo "make dist    build the wheel and the sdist into dist/"
	@echo "make slow    run the tests at full size (15 minutes, 12 GB of memory and 20 GB of disk)"
	@echo "make check   what CI runs: lint, format, types, import contracts, tests"
	@echo "make format  reformat the code"
	@echo "make experiments-small  rerun the laptop-sized experiments (hours; needs DATAMERGE_DATA)"
	@echo "make bench   every performance bar against its peers (15 minutes; BENCH_FLAGS=--gpu on a GPU)"
	@echo "make gpu     tests and benchmarks that need a GPU (8 minutes, no network; PYTHON=… with a torch for it)"
	@echo "make gpu-wheels  the packages of make gpu as wheels in .gpu-wheels, for a machine without a network"
	@echo "make docs    build the documentation into site/, to be opened in a browser without a server"
	@echo "make pictures  draw the documentation's pictures again (needs Graphviz)"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing datamerge and what the demo needs into $(VENV) …"
	$(PIP) torch
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "installing test tools into $(VENV) …"
	$(PIP) -e '.[dev]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/datamerge demo demo-output

# Finished parts are kept in experiments-output and not done again.
ARMS = digits/epsilon-26 cifar10/epsilon-2 cifar10/epsilon-4 cifar10/refined cifar10/refined-epsilon-4 cifar10/deviation \
	photos/epsilon-2 photos/epsilon-4
FRONT = digits-26 cifar10-2 cifar10-4 relatives-2 photos-2 photos-2-longer
experiments-small: $(VENV)/.demo
	@test -d "$$DATAMERGE_DATA" || { echo "set DATAMERGE_DATA to the folder with mnist, cifar10 and nips17" >&2; exit 2; }
	$(PIP) -e '.[experiments]'
	$(BIN)/python -m experiments.class_means.run --data "$$DATAMERGE_DATA" --work experiments-output/class_means
	$(BIN)/python -m experiments.clusters.run --data "$$DATAMERGE_DATA" --work experiments-output/clusters
	for arms in $(ARMS); do \
	  $(BIN)/python -m experiments.arms experiments/$$arms.toml --data "$$DATAMERGE_DATA" \
	    --work experiments-output/$${arms%/*} || exit; \
	done
	for front in $(FRONT); do \
	  $(BIN)/python -m experiments.front.run experiments/front/$$front.toml --data "$$DATAMERGE_DATA" \
	    --work experiments-output/front-$${front%%-*} || exit; \
	done
	$(BIN)/python -m experiments.views.run --data "$$DATAMERGE_DATA" --work experiments-output/views

# A process for each core; more than four would wait for the tests of the Ray cluster, which share one.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4

# uv, because pip always takes the newest.
FLOORS := .floors
TEST_TOOLS := 'pytest<9.2' pytest-xdist hypothesis jsonschema 'moto[server]' pyyaml tensorstore xarray datasets mlcroissant hatchling
test-floors:
	$(PYTHON) -m venv --clear $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet uv
	$(FLOORS)/bin/uv pip compile --quiet --resolution lowest-direct pyproject.toml -o $(FLOORS)/floors.txt
	$(FLOORS)/bin/uv pip install --quiet --python $(FLOORS)/bin/python -r $(FLOORS)/floors.txt .
	for one in zarr-uint8_moments webdataset-float32; do \
	  $(FLOORS)/bin/datamerge verify tests/golden/v1/$$one-full && \
	  $(FLOORS)/bin/datamerge convert tests/golden/v1/$$one-full $(FLOORS)/$$one && \
	  $(FLOORS)/bin/datamerge diff tests/golden/v1/$$one-full $(FLOORS)/$$one || exit; \
	done

# The same of the extras, with the newest tools for the tests: the whole suite.
test-floors-all:
	$(PYTHON) -m venv --clear $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet uv
	$(FLOORS)/bin/uv pip compile --quiet --resolution lowest-direct --extra all --extra heif pyproject.toml -o $(FLOORS)/floors.txt
	$(FLOORS)/bin/uv pip install --quiet --python $(FLOORS)/bin/python -r $(FLOORS)/floors.txt -c $(FLOORS)/floors.txt -e . \
	  $(TEST_TOOLS)
	$(FLOORS)/bin/python -m pytest --numprocesses logical --maxprocesses 4

dist: $(VENV)/bin/python
	$(PIP) build
	$(BIN)/python -m build --outdir dist

# Seconds and memory of every stage go to the folder of DATAMERGE_REPORTS, if it is set.
slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow tests/slow

lint: $(VENV)/.dev
	$(BIN)/ruff check $(PACKAGES)
	$(BIN)/ruff format --check $(PACKAGES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

check: lint test

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(PACKAGES)
	$(BIN)/ruff format $(PACKAGES)

$(VENV)/.bench: $(VENV)/.dev
	@echo "installing what benchmarks/ compares with into $(VENV) …"
	$(PIP) -e '.[bench]'
	@touch $@

# Reports and plots go to benchmarks/results. The photos of DATAMERGE_DATA are used where it is set.
bench: $(VENV)/.bench
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.run $(BENCH_FLAGS)

# Not in .venv: torch for the GPU is where the GPU is.
gpu:
	PYTHON=$(PYTHON) .ci/gpu.sh

gpu-wheels:
	PYTHON=$(PYTHON) .ci/gpu-wheels.sh

# site/index.html opens from the disk, search included.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Needs Graphviz. PICTURES names those to draw; all are drawn otherwise, some by merging photos (minutes).
pictures: $(VENV)/.dev
	$(PIP) -e '.[experiments]'
	$(BIN)/python -m docs.pictures.draw $(PICTURES)

clean:
	rm -rf $(VENV) $(FLOORS) dist .gpu-wheels .gpu-site demo-output site .mypy_cache .ruff_cache .pytest_cache .hypothesis
