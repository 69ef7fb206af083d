# Every target works on a fresh machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
JOBS ?= 2
DEMO_DIR ?= runs/demo
DEMO_OPTIONS ?=

.PHONY: help env demo test test-all test-oldest fuzz bench docs notebooks dist check format gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

env: $(VENV)/.installed  ## create the virtual environment

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --config-settings editable_mode=compat -e '.[brats,dev,networks,lightning,monai,accelerate,export,nnunet]'
	touch $@

demo: env  ## the whole path on synthetic subjects: teacher, baseline, student, report
	$(BIN)/python examples/brats_kdnet/train.py --out $(DEMO_DIR) $(DEMO_OPTIONS)

test: env  ## the suite, doctests included
	$(BIN)/python -m pytest -n $(JOBS)

test-all: env  ## everything, slow and fault tests too
	$(BIN)/python -m pytest -n $(JOBS) -m ''

test-oldest:  ## the suite with the oldest versions of all packages, in an environment of its own
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=oldest.txt

fuzz: env  ## the property tests alone, 10,000 generated examples each; hours
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n $(JOBS) -m hypothesis --timeout=0

bench: env  ## every benchmark: numbers, files, drawing, page; ten minutes on an idle machine
	$(BIN)/python benchmarks/run.py

docs: $(VENV)/.docs  ## the documentation site in docs/_build, with warnings as errors
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build

notebooks: $(VENV)/.docs  ## run the notebooks anew and store their outputs
	OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore $(BIN)/jupyter execute --inplace docs/tutorials/*.ipynb

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

dist: env  ## wheel and source archive in dist/
	$(BIN)/python -m build

check: env  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy privdistill
	$(BIN)/mypy examples/brats_kdnet

format: env  ## rewrite files in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

GPU_PARTS ?= compile resume nnunet study steps

gpu: env  ## what only a CUDA device can show, a part at a time: compile, resume, nnU-Net, study, steps
	@status=0; for part in $(GPU_PARTS); do \
	    $(BIN)/python benchmarks/gpu_check.py --part $$part || status=1; \
	done; exit $$status
	$(BIN)/python -m pytest -m gpu

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) $(VENV)-oldest .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info docs/_build
