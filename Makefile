# demo, test, test-gpu and lint each make the environment in .venv first; `make clean` removes it.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
MODELS := $(patsubst %/pyproject.toml,%,$(wildcard models/*/pyproject.toml))
READY := $(VENV)/.ready

$(READY): pyproject.toml $(MODELS:%=%/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,lint,release]" $(MODELS:%=-e ./%)
	touch $@

.PHONY: demo test test-gpu fuzz notebooks lint wheels release containers clean

demo: $(READY)
	$(BIN)/python examples/demo.py $(if $(FROM),--source $(FROM))

test: $(READY)
	$(BIN)/python -m pytest -q

test-gpu:  # in the environment at hand, which has CUDA and TransformerEngine
	$(PYTHON) -m pytest -q -m gpu

fuzz: $(READY)  # some minutes; SEED=N for other damages and moments than last time
	$(BIN)/python fuzz/damage.py --runs 1500 --seed $(or $(SEED),0) --output docs/validation
	$(BIN)/python fuzz/kills.py --runs 150 --exports 10 --seed $(or $(SEED),0) --output docs/validation

notebooks: $(READY)  # of the examples that are written in cells
	$(BIN)/python examples/make_notebooks.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint $(MODELS:%=%/Dockerfile)
	rm -rf build/typed && mkdir -p build/typed
	for model in $(notdir $(MODELS)); do ln -s ../../models/$$model/src/$$model build/typed/biote_$$model; done
	$(BIN)/mypy

wheels: $(READY)  # into dist, and biote's also where each model's Dockerfile looks for it
	rm -rf dist $(MODELS:%=%/wheels)
	for package in . $(MODELS); do $(BIN)/python -m build --no-isolation --outdir dist $$package >/dev/null || exit 1; done
	for model in $(MODELS); do mkdir $$model/wheels && cp dist/biote-*.whl $$model/wheels; done

release: wheels  # what is fit to be uploaded: checked, and used in an environment that has nothing else
	$(BIN)/twine check --strict dist/*
	TORCH=$(TORCH) .ci/try_wheels.sh $(notdir $(MODELS))

containers: wheels
	TORCH=$(TORCH) .ci/containers.sh $(notdir $(MODELS))

clean:
	rm -rf $(VENV) build dist $(MODELS:%=%/wheels)
