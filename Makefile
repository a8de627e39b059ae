# `make build` and `make test` do all the set-up themselves, in .venv, once.
# Another interpreter: make PYTHON=/path/to/python3.12 ...
# Kept to what GNU make 3.81 understands, which is what macOS ships.

PYTHON ?=
MODEL ?=
OUT ?= bundle
PYTEST ?=
# Each test process holds PyTorch and a model: about 2 GB.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 4 ] && n=4; echo $$n)

BIN := .venv/bin
TREE := build/tree
SETUP_INPUTS := pyproject.toml constraints.txt setup.py tools/install.sh tools/tensorrt10.txt
BUILD_READY := .venv/.ready-build
TEST_READY := .venv/.ready-test

.PHONY: help build test lint tree format pins clean distclean

help:
	@echo "make build   set up, then compile the embedded model into $(OUT)/    (MODEL=..., OUT=...)"
	@echo "make test    set up, then linters, dependency rule, types, tests  (PYTEST='-k name', WORKERS=n)"
	@echo "make lint    the same without the tests"
	@echo "make format  let ruff rewrite what it can"
	@echo "make pins    write constraints.txt from what .venv holds"
	@echo "make clean   remove what was built; distclean: the set-up too"

$(BUILD_READY): $(SETUP_INPUTS)
	@tools/install.sh build,onnx $(PYTHON)
	@touch $@

$(TEST_READY): $(SETUP_INPUTS)
	@tools/install.sh all,dev $(PYTHON)
	@touch $(BUILD_READY) $@

build: $(BUILD_READY)
	@$(BIN)/diffoundry build $(MODEL) --out $(OUT)

tree: $(TEST_READY)
	@$(BIN)/python tools/symlink_tree.py $(TREE)

lint: tree
	@echo "ruff check"
	@$(BIN)/ruff check --quiet --output-format concise .
	@echo "ruff format"
	@$(BIN)/ruff format --quiet --check --output-format concise .
	@echo "dependency rule"
	@PYTHONPATH=$(TREE) $(BIN)/lint-imports --no-cache > build/lint-imports.txt 2>&1 || { cat build/lint-imports.txt; exit 1; }
	@echo "types"
	@$(BIN)/mypy

test: lint
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST)

format: $(TEST_READY)
	@$(BIN)/ruff check --fix --output-format concise . || true
	@$(BIN)/ruff format .

pins: tree
	@$(BIN)/python tools/pin.py all dev > build/constraints.txt
	@mv build/constraints.txt constraints.txt

clean:
	@rm -rf build dist bundle .mypy_cache .ruff_cache .pytest_cache
	@find core exporters compilers runtimes profiles artifacts tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	@rm -rf .venv diffoundry.egg-info
