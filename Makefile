# SPDX-License-Identifier: Apache-2.0
# Nothing has to be done by hand before any of these: tools/setup.sh makes what is missing.
PY := .venv/bin/python
JOBS ?= 2
PYTEST_ARGS ?=
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help demo test test-all lint check bench dist clean distclean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## set up, then probe real QEMU devices behind a real emulated IOMMU
	@tools/setup.sh run
	@.venv/bin/virtiova probe
	@echo
	@echo "Next: .venv/bin/virtiova matrix -o matrix.html    every system that there is, and a page with a picture of each way"

test: ## set up, then all tests but the long sweeps
	@tools/setup.sh dev
	@$(PY) -m pytest -q -n $(JOBS) --full-run -m "not sweep" $(PYTEST_ARGS)

test-all: ## all tests
	@tools/setup.sh dev
	@$(PY) -m pytest -q -n $(JOBS) --full-run $(PYTEST_ARGS)

lint: ## format, lint and types
	@tools/setup.sh dev
	@ruff format --check --quiet . || { echo "run: ruff format" >&2; exit 1; }
	@ruff check --quiet .
	@mypy
	@stubtest --concise --mypy-config-file pyproject.toml virtiova._core virtiova._load

check: lint test ## all that CI does

bench: ## what it costs
	@tools/setup.sh run
	@.venv/bin/virtiova bench blk --quick
	@.venv/bin/virtiova bench net --quick
	@.venv/bin/virtiova bench iotlb --quick
	@$(PY) bench/run.py
	@$(PY) bench/iotlb.py
	@$(PY) bench/serve.py
	@$(PY) bench/invalidate.py

dist: ## sdist and abi3 wheel, of what is committed, into dist/
	@tools/setup.sh dev
	@rm -rf dist
	@$(PY) -m build --no-isolation --skip-dependency-check

clean: ## take away what was built
	@rm -rf build dist src/virtiova/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## and the virtual environment
	@rm -rf .venv
