# What one runs here. `make test` and `make demo` set everything up first, in .venv; nothing else on the machine is changed
# (scripts/setup says what the system lacks, and asks before it installs any of it).
#
#   make test ARGS="-k planner"     arguments for pytest
#   make demo ARGS="--quick"        arguments for the demo

PYTHON := .venv/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup native test docs-test demo demo-recovery bench lint format sanitize clean

help:  ## show this
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F "|" '{printf "%-18s %s\n", $$1, $$2}'

setup:  ## make .venv with all that the rest needs
	@scripts/setup

native: setup  ## build the native core into ckpt/kernels/
	@scripts/build_native.sh "$(CURDIR)/$(PYTHON)"

test: setup  ## run the tests
	@$(PYTHON) -m pytest $(ARGS)

docs-test: setup  ## run the code blocks of the docs
	@$(PYTHON) -m pytest tests/docs $(ARGS)

demo: setup  ## train, get killed, resume on other layouts, and draw the loss curves
	@$(PYTHON) examples/demo.py $(ARGS)

demo-recovery: setup  ## train on several nodes (network namespaces, as root), lose more and more of them at once, and go on
	@$(PYTHON) examples/recovery/demo.py $(ARGS)

bench: setup  ## measure ckpt and its peers side by side; ARGS="--tiny" for a try, "--only small" for one of them
	@$(PYTHON) -m bench $(ARGS)

lint: setup  ## ruff and mypy
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

format: setup  ## let ruff format and sort
	@$(PYTHON) -m ruff check --fix --select I .
	@$(PYTHON) -m ruff format .

sanitize:  ## run the native tests under the address, undefined and thread sanitizers
	@scripts/sanitize.sh

clean:  ## remove everything that was made here, .venv included
	rm -rf .venv build dist demo-out bench/out .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info
	rm -f ckpt/kernels/_native.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
