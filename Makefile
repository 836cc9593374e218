# `make quickstart` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without a GPU the CPU build of torch: the default one brings gigabytes of CUDA packages.
CPU_TORCH ?= torch==2.13.0
TORCH_INDEX ?=

.PHONY: install quickstart test torture fuzz soak docs clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if ! command -v nvidia-smi >/dev/null 2>&1 && ! $(BIN)/python -c "import torch" 2>/dev/null; then \
	    $(BIN)/pip install $(TORCH_INDEX) "$(CPU_TORCH)"; fi
	$(BIN)/pip install -e ".[dev]"
	touch $@

quickstart: install
	$(BIN)/longrope run configs/quickstart

# Of the test files this many run at a time, one for each core; about 2 GiB of memory each.
AT_A_TIME ?= 4
test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n logical --maxprocesses $(AT_A_TIME) --dist loadfile

# N signals at random moments; what comes of them is appended to benchmarks/results/torture.jsonl.
N ?= 100
SEED ?= $(shell date +%s)
torture: install
	PYTHONPATH=tests $(BIN)/python -m torture --moments $(N) --seed $(SEED)

# Training, evaluation and search over and over: samples add up in benchmarks/results/soak.jsonl.
MINUTES ?= 30
soak: install
	$(BIN)/python tests/soak.py --minutes $(MINUTES)

# Damaged files by the ten thousand before every reader; counts are appended to benchmarks/results/fuzz.jsonl.
INPUTS ?= 10000
fuzz: install
	$(BIN)/python tests/fuzzing/run.py -n $(INPUTS) --seed $(SEED) --out benchmarks/results/fuzz.jsonl

docs: install
	$(BIN)/sphinx-build -E -W --keep-going -q docs docs/_build/html
	@echo docs/_build/html/index.html

clean:
	rm -rf docs/_build docs/api docs/commands $(VENV) .mypy_cache .pytest_cache .ruff_cache
