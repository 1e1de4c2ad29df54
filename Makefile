# make demo         the whole line in miniature: train, generate, score, time, report
# make test         the tests, for which it builds VBench's own interpreter as well
# make lint         format, style and types
# make bench        the measurements that benchmarks/ holds, one after another; vbench.py, gpu.py and launches.py need more than a laptop has
# make clean        removes the environment and caches; runs/ and reports/ stay

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(if $(shell command -v $(name)),$(name))))
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -qq --no-compile --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu
WORKERS ?= 2

# Packages are compiled when they are first imported, not all at once by pip: a minute less. That needs permission to keep the result.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint bench clean

demo: $(VENV)/ready
	$(BIN)/rfbench reproduce toy
	@echo "That is the page: open it in a browser."

# RFBENCH_VBENCH_PYTHON names an interpreter that is there; RFBENCH_SLOW=1 adds what takes minutes and large networks.
test: $(VENV)/ready-dev
	@export RFBENCH_VBENCH_PYTHON="$${RFBENCH_VBENCH_PYTHON:-$$($(BIN)/rfbench env vbench)}" && \
	test -n "$$RFBENCH_VBENCH_PYTHON" && $(BIN)/python -m pytest -q -n $(WORKERS)

lint: $(VENV)/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(foreach file,$(filter-out %/vbench.py %/gpu.py %/launches.py,$(wildcard benchmarks/*.py)),$(BIN)/python -m benchmarks.$(notdir $(basename $(file))) &&) true

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Without a GPU, torch's CPU build (200 MB, not several GB): from the configured index if that has it, else from torch's own.
# On macOS, and where neither can be reached, the plain build comes with the rest.
$(VENV)/ready $(VENV)/ready-dev: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("rfbench needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi > /dev/null; then \
	  echo "No GPU found: installing the CPU build of $(TORCH)"; \
	  $(INSTALL) --no-deps "$(TORCH)+cpu" 2> /dev/null || \
	  $(INSTALL) --no-deps --retries 1 --index-url $(CPU_INDEX) "$(TORCH)+cpu" || \
	  echo "There is no CPU build of $(TORCH) in reach: the plain one follows, which is larger"; \
	fi
	$(INSTALL) --editable '.$(if $(filter %-dev,$@),[dev])'
	@touch $(VENV)/ready $@
