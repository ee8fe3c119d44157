# Two commands do everything: `make demo` and `make test`. Each makes a virtual
# environment of its own first; Python 3.11 or newer is all that must be there.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test test-all bench clean

demo: $(VENV)/ready
	$(RUN) -m roli_jax.main --config=configs/glyphs_roli.py --workdir=runs/demo

test: $(VENV)/ready-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest -n 2 --dist loadfile

# What is slow: full-size networks, whole grids, wheels.
test-all: $(VENV)/ready-test
	$(RUN) -m pytest -n 2 --dist loadfile -m slow

bench: $(VENV)/ready
	$(RUN) -m roli_jax.main --mode=bench --config=configs/bench.py

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "roli_jax needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/ready-test: $(VENV)/ready requirements-test.txt
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) runs .jax_cache
