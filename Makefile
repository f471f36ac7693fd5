# What a person types. `make help` lists it; tools/setup.sh says what set-up does.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup test demo lint check docs clean

RANKS ?= 1
SIMLAB := .venv/bin/simlab

# Open MPI refuses root and more ranks than cores unless told otherwise (PRTE_: Open MPI 5), and two
# jobs at once must not be bound to the same core. Only here and in mpi_runs/, never in the library.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export OMPI_MCA_rmaps_base_oversubscribe := 1
export OMPI_MCA_hwloc_base_binding_policy := none
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export OMP_NUM_THREADS ?= 1
# threads that wait for each other sleep: spinning ones starve on a shared machine
export OMP_WAIT_POLICY ?= PASSIVE

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## PETSc, MPI and .venv, as far as they are missing
	@tools/setup.sh

test: ## set up, then serial tests and parallel ones on 1, 2 and 3 ranks
	@tools/setup.sh --browser
	@tools/test.sh

demo: setup ## set up, then generate data, train and report: runs/darcy_online (RANKS=1)
	$(SIMLAB) run cases/darcy_online.toml -n $(RANKS) --fresh

lint: setup ## ruff, mypy and the layer rules; all of them, even when one fails
	@tools/lint.sh

check: ## what CI runs: test and lint
	@.ci/run

docs: setup ## the HTML pages, in build/docs
	.venv/bin/python -m pip install -qq -c constraints.txt sphinx myst-parser
	.venv/bin/python -m sphinx -q -W --keep-going -b html docs build/docs

clean: ## remove .venv, caches and built files; runs/ and built wheels stay
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find simlab tests mpi_runs docs -name __pycache__ -type d -prune -exec rm -rf {} +
