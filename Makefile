# `make demo`, `make check` and `make test` set up all that they need on a Debian machine, ask nothing, and skip what is
# there.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?= python3
ARGS ?=
QEMU ?=
WITH_QEMU := $(if $(QEMU),PATH="$(abspath $(QEMU)):$$PATH")
ROUNDS ?= 20
SEED ?=
REQUESTS ?= 20000
SEEDS ?= 2000
HAZARDS ?=
# Most of a live test's time is spent waiting for other processes.
WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# RUNLEVEL=1 keeps Debian from starting the daemons of what it installs.
INSTALL := $(SUDO) env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -qq --yes --no-install-recommends
COMPARED := libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients wrk

# Folders of tests that start no QEMU. tests/core starts none either, and has a run of its own for its coverage.
WITHOUT_QEMU := $(addprefix tests/, house engine journal api webhooks)
# The path of a unix socket has 107 bytes at most, so the folder of the tests' temporary files has a short path.
PYTEST = temporary=$$(mktemp -d /tmp/bj-XXXX); \
	$(1) $(BIN)/python -m pytest --basetemp "$$temporary/t" --numprocesses $(2) --dist loadfile $(3) $(ARGS); \
	rm -rf "$$temporary"

# What `blockjobd` needs to run, and what the tests need on top.
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev

LOCK := CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --no-config --strip-extras --allow-unsafe \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options --annotation-style=line \
	--generate-hashes

.PHONY: help demo check types core test torture fuzz simulate bench serve openapi lock clean python qemu libvirt

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

demo: $(RUNTIME) | qemu ## A real QEMU loses layers of its chain through HTTP, every byte verified (ARGS=--once: and exit)
	@$(BIN)/blockjobd demo $(ARGS)

check: $(DEV) ## All checks, and the tests that need no QEMU, in a minute (ARGS: for pytest)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	# Each of the two keeps one processor busy for half a minute.
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target types core
	$(call PYTEST,,2,$(WITHOUT_QEMU))

types: $(DEV)
	$(BIN)/basedpyright

core: $(DEV)
	$(BIN)/coverage run -m pytest tests/core $(ARGS)
	$(BIN)/coverage report --fail-under=100

test: check | qemu ## `make check`, and the tests on real QEMUs (QEMU=DIR: with the QEMU in DIR; ARGS: for pytest)
	$(call PYTEST,$(WITH_QEMU),$(WORKERS),$(addprefix --ignore ,tests/core $(WITHOUT_QEMU)))

torture: $(DEV) | qemu ## Merges under kills at random moments, all data compared; power cuts of the journal (ROUNDS=20, SEED= to play the same plan again)
	@$(WITH_QEMU) $(BIN)/python -m tests.torture --rounds $(ROUNDS) $(if $(SEED),--seed $(SEED))
	@$(BIN)/python -m tests.journal.power $$((10 * $(ROUNDS))) $(SEED)

fuzz: $(DEV) | qemu ## Requests made of the OpenAPI document, against real QEMUs (REQUESTS=20000, SEED=1)
	@$(WITH_QEMU) $(BIN)/python -m tests.fuzz --requests $(REQUESTS) $(if $(SEED),--seed $(SEED))

simulate: $(DEV) ## The engine in a simulated world, seed after seed (SEEDS=2000, SEED= to see one, HAZARDS=)
	@$(BIN)/python -m tests.engine.simulation --seeds $(SEEDS) $(if $(SEED),--seed $(SEED)) \
		$(if $(HAZARDS),--hazards $(HAZARDS))

bench: $(DEV) | qemu libvirt ## Figures next to raw QMP and to libvirt, at scale (ARGS="small api": only these)
	@$(BIN)/python -m bench $(ARGS)

serve: $(RUNTIME) | qemu ## The service, in the foreground (ARGS="--config FILE")
	@$(BIN)/blockjobd serve $(ARGS)

openapi: $(RUNTIME) ## Write what stands in openapi/ anew
	$(BIN)/python -m app.api.document

lock: $(BIN)/python ## Choose the versions of all dependencies anew
	$(BIN)/python -m pip install --quiet pip-tools
	$(LOCK) --upgrade --output-file requirements.lock pyproject.toml
	$(LOCK) --upgrade --extra dev --constraint requirements.lock --output-file requirements-dev.lock pyproject.toml

clean: ## Remove the virtual environment and what tools have left
	rm -rf $(VENV) build dist *.egg-info .coverage .hypothesis .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME): requirements.lock pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --quiet --no-deps --editable .
	@touch $@

$(DEV): requirements-dev.lock $(RUNTIME)
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements-dev.lock
	@touch $@

# An old pip may not know today's package formats.
$(BIN)/python: | python
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "blockjobd needs Python 3.11 or newer; see make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

python:
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2> /dev/null; then \
		$(SUDO) apt-get update -qq; \
		$(INSTALL) python3-venv > /dev/null; \
	fi

qemu:
	@missing=; \
	for tool in qemu-system-x86_64 qemu-img qemu-io curl; do \
		command -v $$tool > /dev/null || missing=1; \
	done; \
	if [ -n "$$missing" ]; then \
		$(SUDO) apt-get update -qq; \
		$(INSTALL) qemu-system-x86 qemu-utils curl > /dev/null; \
	fi

# What `make bench` compares with.
libvirt:
	@missing=; \
	for tool in libvirtd virsh wrk; do \
		command -v $$tool > /dev/null || missing=1; \
	done; \
	if [ -n "$$missing" ] || [ -z "$$(find /usr/lib -name libvirt_driver_qemu.so)" ]; then \
		$(SUDO) apt-get update -qq; \
		$(INSTALL) $(COMPARED) > /dev/null; \
	fi
