# Debian 12 with python3.11, python3-venv and make is enough; everything else goes into .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo model test soak lint format wheelhouse

PYTHON = $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
DATA ?=
SCANS ?=
WHEELHOUSE ?= build/wheelhouse
TORCH_INDEX ?=
SOAK_SECONDS ?= 10800

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## create .venv with the pinned versions (once, a few minutes)
	@echo ".venv is ready"

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3 found: apt-get install python3.11 python3.11-venv" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11: choose another one with make setup PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv .venv \
		|| { echo "venv failed: apt-get install python3.11-venv, remove .venv and try again" >&2; exit 1; }
	@echo "setup: $$(grep -c == constraints.txt) pinned packages into .venv (7 GB, a few minutes, once)"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## train, evaluate and classify phantoms over S3; DATA=<folder or s3://...>: your data; SCANS=<folder>
	@$(BIN)/python -m tools.demo $(if $(DATA),--data '$(DATA)') $(if $(SCANS),--scans '$(SCANS)')

model: $(READY) ## train the shipped model on DATA=<data set of jobs/acquire.py>, into btray/pretrained (docs/model.md)
	@test -n "$(DATA)" || { echo "make model needs DATA=<folder or manifest of labelled slices>" >&2; exit 2; }
	@$(BIN)/python jobs/train.py --data '$(DATA)' --out models/brain-mri --outliers other --leave-out ct \
		--abstain-target 0.9 --validate-by folds --refit-epochs 0
	@$(BIN)/python jobs/publish.py --model models/brain-mri --data '$(DATA)' --license btray/pretrained/LICENSE \
		--out btray/pretrained/brain-mri --overwrite

test: $(READY) ## lint, types and all tests except soak; a failing step does not stop the others
	@failed=; \
	step() { echo; echo "== $$*"; local from=$$SECONDS; "$(BIN)/$$@" || failed+=" $$1"; echo "== $$1: $$((SECONDS - from)) s"; }; \
	step ruff check .; \
	step ruff format --check .; \
	step mypy; \
	step lint-imports --no-logo; \
	step pytest -q -m 'not soak' --durations=20 -n 2 --dist loadfile --no-loadscope-reorder; \
	echo; \
	if [ -n "$$failed" ]; then echo "FAILED:$$failed"; exit 1; else echo "all passed"; fi

soak: $(READY) ## the long tests, stopped after SOAK_SECONDS
	@timeout --signal=INT --kill-after=60 $(SOAK_SECONDS) $(BIN)/pytest -m soak --durations=0 --timeout=3600

wheelhouse: ## put the wheels of a production install into WHEELHOUSE=<folder>; TORCH_INDEX=<url>: torch from there
	@mkdir -p '$(WHEELHOUSE)'
	@"$(PYTHON)" -m pip wheel --disable-pip-version-check -c constraints.txt -w '$(WHEELHOUSE)' \
		$(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') '.[tune]'
	@cp constraints.txt '$(WHEELHOUSE)'

lint: $(READY) ## only ruff, mypy and the import rules
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: $(READY) ## format the sources and apply ruff's safe fixes
	@$(BIN)/ruff check --fix-only . && $(BIN)/ruff format .
