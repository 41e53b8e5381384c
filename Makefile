# Two commands from a fresh clone: `make train` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
STAMP := $(VENV)/.installed
WORLD := worlds/movielens_100k
LOG := envs_data/movielens_100k

.PHONY: train install test test-slow check format wheel clean help

help:
	@echo "make train    MovieLens-100K: log, world, headroom, agents, comparison, report (about 17 minutes on 2 cores)"
	@echo "make test     the tests"
	@echo "make check    ruff, mypy, import-linter"
	@echo "make wheel    build the wheel and try it in a clean environment"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else f"{sys.executable} is Python {v}; 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

install: $(STAMP)

train: $(STAMP)
	$(RUN) envs_data.movielens_100k.prepare
	$(RUN) experiments.build_world --log $(LOG) --out $(WORLD)
	$(RUN) experiments.headroom --world $(WORLD)
	$(RUN) experiments.compare --world $(WORLD) --agents all

test: $(STAMP)
	$(RUN) pytest

test-slow: $(STAMP)
	$(RUN) pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

wheel: $(STAMP)
	rm -rf dist build
	$(RUN) build --wheel --outdir dist .
	PYTHON=$(PYTHON) bash .ci/smoke_wheel

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
