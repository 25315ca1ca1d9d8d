# The commands of this project. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
UV := $(BIN)/uv
ISOLATE := $(PYTHON) tools/isolate.py --
# The first interpreter that is new enough; override with `make BASE_PYTHON=/path/to/python3.12`.
BASE_PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# Containers often set it. Tests start Python hundreds of times, and each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

# How many tests run at once, each worker in a network namespace of its own; 0: one after the other. By default one for
# each of at most four cores, and one more: tests often wait.
CORES := $(shell cores=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN || echo 1); echo $$((cores < 4 ? cores : 4)))
JOBS ?=

.PHONY: help page page-if-possible plugin-if-possible screenshots setup setup-dev serve test test-fast test-binaries check fmt bench sim container chaos overload soak sanitized-rpc fuzz fuzz-frames rpc-corpus rpc-kernels binaries lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(PYTHON):
	@if [ -z "$(BASE_PYTHON)" ]; then \
	  echo "mesh-llm needs Python 3.11 or newer, and found none. Install it, or say where it is: make BASE_PYTHON=/path/to/python3" >&2; exit 1; fi
	@$(BASE_PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Could not make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.bootstrap: requirements/bootstrap.lock | $(PYTHON)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.lock
	@touch $@

$(VENV)/.runtime: requirements/runtime.lock pyproject.toml $(VENV)/.bootstrap
	@echo "Installing mesh-llm and what it needs into $(VENV) ..."
	@$(UV) pip install --quiet --python $(PYTHON) --require-hashes -r requirements/runtime.lock
	@$(UV) pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.lock $(VENV)/.runtime
	@echo "Installing test and development tools ..."
	@$(UV) pip install --quiet --python $(PYTHON) --require-hashes -r requirements/dev.lock
	@touch $@

setup: $(VENV)/.runtime page-if-possible plugin-if-possible ## Install mesh-llm into .venv; leaves .venv/bin/mesh-llm

setup-dev: $(VENV)/.dev page ## Also install test tools, system packages for tests, the engine's RPC plugin, and its Vulkan plugin (4 CPU-minutes, once)
	@bash tools/system_packages.sh tests browser vulkan service
	@$(PYTHON) tools/engine_source.py > /dev/null
	@$(PYTHON) tools/build_plugin.py
	@$(PYTHON) tools/build_vulkan.py

page: $(VENV)/.runtime ## Build the console's page, where web/ changed
	@$(PYTHON) tools/build_page.py

screenshots: setup-dev ## Pictures of the console's page, of a real mesh, into docs/screenshots
	@$(ISOLATE) $(PYTHON) -m tests.screenshots $(ARGS)

page-if-possible: $(VENV)/.runtime
	@$(PYTHON) tools/build_page.py --optional

plugin-if-possible: $(VENV)/.runtime
	@$(PYTHON) tools/build_plugin.py --optional

serve: setup ## Serve the built-in tiny model on :9337, console on :3131
	@exec $(BIN)/mesh-llm --model tiny

test: setup-dev sanitized-rpc ## Install what is needed and run all tests, in a network namespace without a route
	@$(ISOLATE) $(PYTHON) -m pytest --numprocesses $(or $(JOBS),$(shell expr $(CORES) + 1)) --dist worksteal $(ARGS)

test-fast: $(VENV)/.dev page ## Unit, property and simulation tests without the slow ones: under a minute
	@$(ISOLATE) $(PYTHON) -m pytest --numprocesses $(or $(JOBS),$(shell expr $(CORES) + 1)) --dist worksteal --durations=0 --durations-min=1 \
	  -m "not large and not binaries and not slow" --hypothesis-profile fast tests/unit tests/property tests/sim $(ARGS)

check: $(VENV)/.dev ## Lint, format check, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports
	@$(PYTHON) tools/build_page.py --check
	@$(PYTHON) tools/structure.py

fmt: $(VENV)/.dev ## Format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

sim: $(VENV)/.dev ## The mesh simulation at full size: 1,000 nodes and more (minutes)
	@$(ISOLATE) $(PYTHON) -m pytest -m large tests/sim $(ARGS)

sanitized-rpc: $(VENV)/.dev ## Build the engine's rpc-server with sanitizers into .venv/sanitized (3 CPU-minutes)
	@$(PYTHON) -m tools.build_sanitized --system-packages $(VENV)/sanitized

fuzz: $(VENV)/.dev sanitized-rpc ## An hour of graphs that the RPC firewall accepts, computed under sanitizers (ARGS="--minutes 5 --seed 1")
	@$(ISOLATE) $(PYTHON) -m tests.oracle $(ARGS)

fuzz-frames: $(VENV)/.dev ## An hour of damaged requests at the RPC firewall (ARGS="--minutes 5 --seed 1")
	@$(ISOLATE) $(PYTHON) -m tests.fuzz.rpc_fuzzer $(ARGS)

rpc-corpus: setup-dev ## Record the RPC traffic of every architecture again (ARGS='--only llama,gemma'); for a new engine
	@$(ISOLATE) $(PYTHON) -m tests.rpc_corpus $(ARGS)

rpc-kernels: setup-dev ## What changed of the engine's kernels since the firewall's rules were read from them (ARGS=--write once they follow)
	@$(PYTHON) -m tools.rpc_kernels $(ARGS)
	@$(PYTHON) tools/firewall_table.py

test-binaries: setup-dev ## Tests with a llama.cpp of your own: make test-binaries BIN_DIR=/path/to/bin
	@MESH_LLM_TEST_BIN_DIR="$(abspath $(BIN_DIR))" $(ISOLATE) $(PYTHON) -m pytest -m binaries tests $(ARGS)

container: $(VENV)/.dev ## Execute the Containerfile in a Debian of its own, and run the node in it (minutes; root; needs a network)
	@bash tools/system_packages.sh container
	@$(PYTHON) -m tests.container $(ARGS)

chaos: setup-dev ## Faults under load for 30 minutes, seeded; ARGS='--minutes 5 --seed 2'; table into docs/reliability.md
	@$(ISOLATE) $(PYTHON) -m tests.chaos --write docs/reliability.md $(ARGS)

overload: setup-dev ## Ten times as many clients as the mesh has places, for 10 minutes; ARGS='--minutes 2'
	@$(ISOLATE) $(PYTHON) -m tests.chaos.overload --write docs/reliability.md $(ARGS)

soak: setup-dev ## Load at half capacity for an hour: nothing may grow; ARGS='--minutes 10'
	@$(ISOLATE) $(PYTHON) -m tests.chaos.soak --write docs/reliability.md $(ARGS)

bench: setup-dev ## Side-by-side benchmarks; prints tables, writes bench/results/
	@$(PYTHON) -m bench $(ARGS)

binaries: setup ## Build stock llama.cpp programs into .venv/llama-bin, for --bin-dir (20 CPU-minutes; needs cmake)
	@$(PYTHON) tools/build_binaries.py $(VENV)/llama-bin

lock: $(VENV)/.bootstrap ## Resolve the dependencies again, with hashes and without addresses
	@$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header $(LOCKFLAGS) \
	  --group bootstrap -o requirements/bootstrap.lock
	@$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header $(LOCKFLAGS) \
	  --group build pyproject.toml -o requirements/runtime.lock
	@$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header $(LOCKFLAGS) \
	  --group build --group dev pyproject.toml -o requirements/dev.lock
	@$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header $(LOCKFLAGS) \
	  --group page -o requirements/page.lock
	@cd bench/conform/locks && for one in *.in; do \
	  $(abspath $(UV)) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	    --no-emit-index-url --no-header $(LOCKFLAGS) $$one -o $${one%.in}.txt || exit 1; done

clean: ## Remove everything that can be made again
	rm -rf $(VENV) web/node_modules src/mesh_llm/console/built build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
