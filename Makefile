# Two commands set everything up on a fresh machine: `make lab` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PORT   ?= 8888
# Jupyter refuses to run as root (as in a container) unless told to.
ROOT_FLAG := $(if $(filter 0,$(shell id -u)),--allow-root)
# What is published is computed, not remembered from other code.
EMPTY_CACHE := cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && ALKAHEST_CACHE="$$cache"
# TORCH=cpu leaves out CUDA, which torch brings on Linux: several GB.
CPU_INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)
INSTALL := $(BIN)/python -I .make/install.py -c constraints.txt $(CPU_INDEX)
# No question about news on the first start; language servers are for editors.
SETTINGS := $(VENV)/share/jupyter/lab/settings
QUIET := --LanguageServerManager.autodetect=False

.PHONY: lab work test check format docs notebooks reproduce bench clean

# Everything needed to use the package and its notebooks.
$(VENV)/.lab: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 lab")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[lab,sample,search,fast]'
	mkdir -p $(SETTINGS)
	cp .make/overrides.json $(SETTINGS)/overrides.json
	touch $@

$(VENV)/.dev: $(VENV)/.lab
	$(INSTALL) -e '.[lab,sample,search,fast,train,dev]'
	touch $@

# Notebooks are run as copies in work/, which git does not look at: yours, so what is there already stays.
work:
	@mkdir -p work
	@for one in notebooks/*.ipynb; do \
	  mine=work/$$(basename $$one); \
	  if [ ! -e $$mine ]; then cp $$one $$mine; \
	  elif [ $$one -nt $$mine ]; then echo "$$one is newer than your $$mine: delete yours to get it"; fi; \
	done

lab: $(VENV)/.lab work
	$(BIN)/jupyter lab --port $(PORT) $(ROOT_FLAG) $(QUIET) --LabApp.default_url=/lab/tree/work/00-start-here.ipynb

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

$(VENV)/.docs: $(VENV)/.dev
	$(INSTALL) -e '.[lab,sample,search,fast,train,dev,docs]'
	touch $@

# The site, in site/: strict, so that a link that leads nowhere stops it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -f .make/mkdocs.yml

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
