# make demo    the whole line in miniature: train, generate, score, time, report
# make test    the tests
# make lint    format, style and types
# make bench   cached streaming against the loop that recomputes everything
# make clean   removes the environment and caches; runs/ and reports/ stay

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(if $(shell command -v $(name)),$(name))))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --no-compile --constraint constraints.txt
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu
WORKERS ?= 2

.PHONY: demo test lint bench clean

demo: $(VENV)/ready
	$(BIN)/rfbench reproduce toy
	@echo "Open reports/index.html"

test: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -n $(WORKERS)

lint: $(VENV)/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.streaming

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Without a GPU, torch's CPU build (200 MB, not several GB): from the configured index if that has it, else from torch's own.
# Where neither can be reached, and on macOS, the plain build is installed below.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rfbench needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi > /dev/null; then \
	  echo "No GPU found: installing the CPU build of $(TORCH)"; \
	  $(INSTALL) --no-deps "$(TORCH)+cpu" 2> /dev/null || \
	  $(INSTALL) --no-deps --retries 1 --index-url $(CPU_INDEX) "$(TORCH)+cpu" || \
	  echo "There is no CPU build of $(TORCH) in reach: installing the plain one, which is larger"; \
	fi
	$(INSTALL) --editable .
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(INSTALL) --editable '.[dev]'
	@touch $@
