# Two commands from a fresh clone: `make train` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
STAMP := $(VENV)/.installed
WORLD := worlds/movielens_100k
LOG := envs_data/movielens_100k
# those of the published table; `all` (agents/roster.py) takes hours
AGENTS := ppo sb3_ppo linucb population_ucb epsilon_greedy thompson ucb1
OLD_GYM := build/gymnasium-1.2.2
ENV_TESTS := $(addprefix tests/test_,$(addsuffix .py,testing conformance vector_env single_env sb3_env actions env_settings env_sessions tune replay))

.PHONY: train pages install test test-slow test-gymnasium-1.2 integrations coverage check format wheel clean help

help:
	@echo "make train    MovieLens-100K: log, world, headroom, agents, comparison, report (9 to 19 minutes on 2 cores)"
	@echo "make test     the tests"
	@echo "make pages    a page for every environment that has a name"
	@echo "make test-gymnasium-1.2   the environments' tests with gymnasium 1.2.2"
	@echo "make integrations   trains in RLlib and Tianshou, each in an environment of its own"
	@echo "make coverage how often the intervals hold the truth"
	@echo "make check    ruff, mypy, import-linter"
	@echo "make wheel    build the wheel and try it in a clean environment"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else f"{sys.executable} is Python {v}; 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on -c constraints.txt -e '.[dev,ab,agents,explain,integrations,llm,onnx,ray,recommenders,tune]'
	@touch $(STAMP)

install: $(STAMP)

train: $(STAMP)
	$(RUN) envs_data.movielens_100k.prepare
	$(RUN) experiments.build_world --log $(LOG) --out $(WORLD)
	$(RUN) experiments.headroom --world $(WORLD)
	$(RUN) experiments.compare --world $(WORLD) --agents $(AGENTS)

pages: $(STAMP)
	$(RUN) experiments.scenario_pages

# a file stays in one process: its tests may share what is dear to make
test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) pytest -n auto --dist loadfile

test-slow: $(STAMP)
	$(RUN) pytest -m slow

test-gymnasium-1.2: $(STAMP)
	test -d $(OLD_GYM)/gymnasium || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLD_GYM) gymnasium==1.2.2
	OMP_NUM_THREADS=1 PYTHONPATH=$(OLD_GYM) $(RUN) pytest -n auto --dist loadfile $(ENV_TESTS)

integrations: $(STAMP)
	$(RUN) experiments.integrations.make_environment rllib
	$(RUN) experiments.integrations.make_environment tianshou
	$(RUN) pytest -m slow tests/test_integrations.py

coverage: $(STAMP)
	$(RUN) experiments.coverage --part off_policy
	$(RUN) experiments.coverage --part ab

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
