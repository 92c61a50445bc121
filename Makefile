# Everything that a contributor runs. PYTHON names the interpreter of the environment that has ddkit[dev].
PYTHON ?= python
BIN := $(shell $(PYTHON) -c 'import os, sys; print(os.path.dirname(sys.executable))')

.PHONY: check lint test check-slow check-gpu

check: lint test

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(BIN)/lint-imports

test:
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

check-slow:
	$(PYTHON) -m pytest -m slow

check-gpu:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(PYTHON) -m pytest -m gpu && $(PYTHON) -m ddkit bench --device cuda --cells 1:10,10:50,50:50,10:256; \
	else echo "check-gpu: no GPU here, so nothing was checked."; fi
