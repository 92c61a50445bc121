# Everything that a contributor runs. PYTHON names the interpreter of the environment that has ddkit[dev].
PYTHON ?= python
BIN := $(shell $(PYTHON) -c 'import os, sys; print(os.path.dirname(sys.executable))')

.PHONY: check lint test docs check-slow check-gpu

check: lint test docs

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(BIN)/lint-imports

test:
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

docs:
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet

check-slow:
	$(PYTHON) -m pytest -m slow

check-gpu:
	$(PYTHON) -m tests.check_gpu
