PYTHON ?= python3
VENV ?= .venv
# Two workers with one thread each: the networks are too small for more threads to help, and sums
# over one thread do not depend on the machine's core count.
WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
PIP := -m pip install --disable-pip-version-check
PIP_INSTALL := $(PIP) --quiet
# What users find in the reference.
USERS_READ := sampler.py classifier.py activeml.py modal.py query_table.py fisher/information.py fisher/mask.py \
	evaluation/curve.py evaluation/display.py
# modAL-python pins skorch==0.9.0, hence without its dependencies; the test extra brings pandas.
MODAL := --no-deps modAL-python==0.4.2.1
PYTEST := -m pytest -rs --doctest-modules -n $(WORKERS) --dist loadgroup tests skfishermask
# Warnings are errors, and every reference must lead somewhere. The builders share what they have read.
SPHINX := -m sphinx -q -W -n --keep-going -j $(WORKERS) -d docs/_build/doctrees
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint types docs bench build oldest clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Made anew only when the dependencies change.
$(READY): pyproject.toml
	@echo "Installing into $(VENV). PyTorch is large: this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -e ".[test,dev,docs]"
	$(BIN)/python $(PIP) $(MODAL)
	@touch $@

demo: $(READY) ## run the quick start: active learning on images of digits, in about a minute
	$(BIN)/python examples/quickstart.py

test: $(READY) ## run the tests and the examples in the docstrings, but for the slow ones
	$(ONE_THREAD) $(BIN)/python $(PYTEST)

slow: $(READY) ## run the slow tests: benchmarks, tutorials, a pretended device
	$(ONE_THREAD) $(BIN)/python $(PYTEST) -m slow

lint: $(READY) ## check style, formatting and docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/numpydoc lint $(addprefix skfishermask/,$(USERS_READ))

types: $(READY) ## check the types
	$(BIN)/mypy

docs: $(READY) ## build the documentation: run its tutorials and examples, check its links
	$(ONE_THREAD) $(BIN)/python $(SPHINX) -b html docs docs/_build/html
	$(ONE_THREAD) $(BIN)/python $(SPHINX) -b doctest docs docs/_build/doctest
	@tail -n 4 docs/_build/doctest/output.txt
	$(BIN)/python docs/check_links.py docs/_build/html
	@echo "The documentation: docs/_build/html/index.html"

# With all cores, but for small networks, and one after the other: they are timings.
bench: $(READY) ## measure speed (an hour), into benchmarks/results
	$(BIN)/python -m benchmarks.speed.embedding
	$(ONE_THREAD) $(BIN)/python -m benchmarks.speed.embedding --networks
	$(BIN)/python -m benchmarks.speed.selection
	$(BIN)/python -m benchmarks.speed.waits
	$(BIN)/python -m benchmarks.speed.query
	$(BIN)/python -m benchmarks.speed.defaults

build: $(READY) ## build sdist and wheel, and check their metadata
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# scikit-activeml and Hugging Face's datasets need newer versions than the oldest that the rest runs on: the former's
# doctest is left out, tests of the latter are skipped.
oldest: ## run the package's tests on the oldest versions supported, but for those that kill processes
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP_INSTALL) -r .ci/oldest-requirements.txt
	$(OLDEST)/bin/python $(PIP_INSTALL) $(MODAL)
	$(OLDEST)/bin/python $(PIP_INSTALL) --no-deps -e .
	$(ONE_THREAD) $(OLDEST)/bin/python $(PYTEST) -m "not kills and not slow" --doctest-ignore-import-errors \
		--ignore tests/benchmarks
	rm -rf $(OLDEST)

clean: ## remove what was built, but keep the environment
	rm -rf dist build output $(OLDEST) docs/_build docs/auto_examples docs/generated docs/sg_execution_times.rst
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find skfishermask tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
