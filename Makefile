# Two commands do everything: `make demo` and `make test`. Each makes a virtual
# environment of its own first; Python 3.11 or newer is all that must be there.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo docs test test-all test-chips bench bench-chip clean

demo: $(VENV)/ready
	$(RUN) -m roli_jax.main --config=configs/glyphs_roli.py --workdir=runs/demo
	$(RUN) -m roli_jax.experiment.photographs --workdir=runs/demo

test: $(VENV)/ready-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest -n 2 --dist loadfile

# What is slow: full-size networks, whole grids, wheels, and report.html in a
# browser, which must be there: apt-get install chromium. What takes long by its
# passes runs with LLVM's optimizations.
test-all: $(VENV)/ready-test
	$(RUN) -m pytest -n 2 --dist loadfile -m slow
	OPTIMIZED=1 $(RUN) -m pytest -n 2 -m passes

# Toys of everything, compiled by the compilers of TPUs and GPUs, without any.
CHIPS ?= .venv-chips
test-chips: $(CHIPS)/ready
	JAX_ENABLE_COMPILATION_CACHE=false timeout 2400 $(CHIPS)/bin/python -m pytest -n 2 --dist loadgroup -m chips tests/chips

# The documentation as a site: site/index.html.
docs: $(VENV)/ready-test
	$(RUN) -m mkdocs build --strict

bench: $(VENV)/ready
	$(RUN) -m roli_jax.main --mode=bench --config=configs/bench.py

# By the Python that has the chip's JAX: make bench-chip PYTHON=...
BUDGET_S ?= 480
bench-chip:
	$(PYTHON) -m roli_jax.bench.chip --config.budget_s=$(BUDGET_S)

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "roli_jax needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/ready-test: $(VENV)/ready requirements-test.txt
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements-test.txt
	touch $@

$(CHIPS)/ready: requirements-chips.txt requirements.txt
	$(PYTHON) -m venv $(CHIPS)
	$(CHIPS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements-chips.txt
	JAX=$$($(CHIPS)/bin/python -c 'import jax; print(jax.__version__)') && $(CHIPS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check "jax[tpu]==$$JAX" "jax-cuda12-plugin==$$JAX"
	touch $@

clean:
	rm -rf $(VENV) $(CHIPS) runs site .jax_cache
