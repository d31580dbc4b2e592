# Everything happens in .venv; no path in here may be absolute, so that folders with spaces work.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: setup demo test test-cluster check fix

PYTHON ?= python3
JSON ?=
BIN := .venv/bin

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
	  echo "trimoe needs Python 3.11 or later; $(PYTHON) is $$("$(PYTHON)" --version 2>&1); say make PYTHON=..." >&2
	  exit 2
	fi
	[[ -x $(BIN)/python ]] || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[platform,imaging,maintenance,deploy,gpu,dev]'
	touch .venv/.ready
	echo "set-up took $$SECONDS s"

demo: setup
	@$(BIN)/trimoe demo $(if $(JSON),--json "$(JSON)")
	echo "demo took $$SECONDS s"

# Tests on a local Ray of several nodes, whose driver may never join (docs/log.md).
CLUSTERS := tests/system/test_cluster.py tests/system/test_lost_node.py

PYTEST := $(BIN)/python -m pytest $(addprefix --ignore=,$(CLUSTERS))

# Two at a time: phases that watch the clock, and those that take what is left of the processor:
# nicer than Ray's workers, which run at 15.
test: setup
	@export OMP_NUM_THREADS=1
	log=$$(mktemp)
	nice -n 19 $(PYTEST) --phases unit,slow >"$$log" 2>&1 & beside=$$!
	trap 'kill $$beside 2>/dev/null || true; rm "$$log"' EXIT
	trap 'exit 130' INT
	failed=0
	$(PYTEST) --phases clock,ray,kafka,browser,data,gpu || failed=1
	wait $$beside || failed=1
	cat "$$log"
	echo "tests took $$SECONDS s"
	exit $$failed

test-cluster: setup
	@for file in $(CLUSTERS); do timeout 300 $(BIN)/python -m pytest "$$file"; done

check: setup
	@$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	echo "checks took $$SECONDS s"

fix: setup
	@$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
