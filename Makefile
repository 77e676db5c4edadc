# `make chat` and `make test` do everything from a fresh clone; the others are steps of them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install chat test lint screenshots clean

install: $(VENV)/.installed

# The environment follows the project file: a change there installs anew.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

chat: install
	$(BIN)/jupiter fetch
	$(BIN)/jupiter-tui

# Units side by side; what starts real stages has the machine to itself.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/engine tests/tui -n 2
	$(BIN)/python -m pytest tests --ignore tests/engine --ignore tests/tui

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The README's pictures, from a real run of about three minutes.
screenshots: install
	$(BIN)/python -m tui.screenshot

clean:
	rm -rf $(VENV) dist .pytest_cache .ruff_cache .mypy_cache
