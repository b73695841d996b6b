# Every target sets itself up: one command on a fresh machine is enough. `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help demo setup test test-all lint format docs clean
BIN := .venv/bin

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=/path/to/python3 make ... chooses the Python that .venv is made from"

demo: ## Set up, then train, evaluate and sample a small GPT on this machine, with a report
	@bash tools/setup.sh all
	@$(BIN)/teratron demo

setup: ## Set up .venv with everything that development needs
	@bash tools/setup.sh test

test: setup lint ## Set up, then lint, type check and the default tests (one file: .venv/bin/pytest tests/config/test_config.py)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-all: setup lint ## The same with every test, slow ones too
	$(BIN)/python -m pytest

lint: setup ## Only ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Format the code and fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## Write docs/config.md anew from the code
	$(BIN)/python -m teratron.cli.help > docs/config.md.new
	mv docs/config.md.new docs/config.md

clean: ## Remove .venv and the caches (never runs or data)
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache .hypothesis
