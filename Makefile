# Two commands set everything up on a fresh machine: `make lab` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PORT   ?= 8888
# Jupyter refuses to run as root (as in a container) unless told to.
ROOT_FLAG := $(if $(filter 0,$(shell id -u)),--allow-root)
# What is published is computed, not remembered from other code.
EMPTY_CACHE := cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && ALKAHEST_CACHE="$$cache"
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: lab test check format notebooks reproduce bench clean

# Everything needed to use the package and its notebooks.
$(VENV)/.lab: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 lab")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[lab,sample,search,fast]'
	touch $@

$(VENV)/.dev: $(VENV)/.lab
	$(PIP) -e '.[lab,sample,search,fast,train,dev]'
	touch $@

lab: $(VENV)/.lab
	$(BIN)/jupyter lab --port $(PORT) $(ROOT_FLAG) --LabApp.default_url=/lab/tree/notebooks/00-start-here.ipynb

# Two test processes on two cores, each with threads: waiting ones must not spin, or small matrices take sixfold.
test: $(VENV)/.dev check
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Execute every notebook and store its outputs.
notebooks: $(VENV)/.dev
	$(EMPTY_CACHE) $(BIN)/python tests/notebook_runs.py

# Every experiment on the shipped miniatures, and one HTML report; `make reproduce RETRAIN=folder` grows the weights afresh.
reproduce: $(VENV)/.lab
	$(EMPTY_CACHE) $(BIN)/alkahest experiment run $(if $(RETRAIN),--retrain $(RETRAIN))
	$(BIN)/alkahest experiment report -o reproduction.html

# Beside the other tools and the floor; BENCH="--full" also on full-size files.
bench: $(VENV)/.lab
	$(BIN)/python experiments/benchmarks/bench.py $(BENCH)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
