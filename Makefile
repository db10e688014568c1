# Each target sets itself up: in the activated environment if there is one, else in .venv.
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PYTHON := $(VENV)/bin/python
BUILT := build/built-in$(subst /,-,$(VENV))
TORCH := torch==2.13.0
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*)
# Test workers: one per core.
JOBS := $(shell nproc 2>/dev/null || echo 2)
PYTEST := $(PYTHON) -m pytest -n $(JOBS) --dist worksteal

.PHONY: demo test test-all test-quick docs bench bench-guard nvcc gpu lint format clean

demo: $(VENV)/.fusegrad-demo $(BUILT)
	$(PYTHON) examples/train_gpt.py $(ARGS)

test: $(VENV)/.fusegrad-test $(VENV)/.fusegrad-docs $(BUILT) lint
	$(PYTEST) $(ARGS)

# What `make test` runs in turns, commit by commit, all at once.
test-all: $(VENV)/.fusegrad-test $(VENV)/.fusegrad-docs $(BUILT) lint
	$(PYTEST) --all $(ARGS)

test-quick: $(VENV)/.fusegrad-test $(VENV)/.fusegrad-docs $(BUILT)
	$(PYTEST) -m "not slow" $(ARGS)

# Broken links and formulas are errors.
docs: $(VENV)/.fusegrad-docs $(BUILT)
	$(PYTHON) -m sphinx -q -W --keep-going docs out/docs

bench: $(VENV)/.fusegrad-demo $(BUILT)
	$(PYTHON) bench/run.py $(ARGS)

bench-guard: $(BUILT)
	$(PYTHON) bench/guard.py

# Every .cu file for every architecture that is supported; needs nvcc and no GPU.
nvcc: $(VENV)/.fusegrad-test $(BUILT)
	FUSEGRAD_NVCC_ARCHS="80 90 100" $(PYTEST) -rP tests/test_nvcc.py

# For a machine with a GPU, with the CUDA build of torch in its python3: make gpu PARTS="build table".
gpu:
	python3 tests/gpu.py $(PARTS)

lint: $(VENV)/.fusegrad-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: $(VENV)/.fusegrad-test
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

$(PYTHON):
	python3 -m venv $(VENV)

$(VENV)/.fusegrad-torch: | $(PYTHON)
	$(PYTHON) -c 'import torch' 2>/dev/null || $(PYTHON) -m pip install --quiet $(TORCH)
	$(PYTHON) -m pip install --quiet 'setuptools>=77' wheel ninja numpy
	touch $@

# Editable, so that a changed Python file needs no installation.
$(BUILT): $(VENV)/.fusegrad-torch $(SOURCES)
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	mkdir -p $(@D) && touch $@

# What an extra of pyproject.toml lists.
$(patsubst %,$(VENV)/.fusegrad-%,test docs demo): $(VENV)/.fusegrad-%: $(VENV)/.fusegrad-torch pyproject.toml
	$(PYTHON) -m pip install --quiet $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$*"])')
	touch $@

clean:
	rm -rf build out python/fusegrad/*.so python/fusegrad/_build_info.py
