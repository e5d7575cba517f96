# Falcon Kit. Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
ARGS ?=

INSTALLED := .venv/.installed
RUN := .venv/bin/python
HYGIENE := tests/project/test_architecture.py tests/project/test_packaging.py tests/project/test_notebooks.py

.DEFAULT_GOAL := help
.PHONY: help demo lab test browser check lint notebooks bench falconet clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## run the model card's example on the embedded model, a minute
	$(RUN) notebooks/demo.py

lab: $(INSTALLED)  ## open the notebooks in JupyterLab (ARGS="--no-browser" and the like are passed on)
	$(RUN) -m jupyterlab notebooks $(ARGS)

test: lint browser  ## everything: lint, all tests, those in a browser too, and every notebook executed
	$(RUN) -m pytest --nbmake --nbmake-timeout=600 tests notebooks $(ARGS)

# Chromium by the system's package manager, where it may; without one, the tests in a browser say that they did not run.
browser: $(INSTALLED)
	@$(RUN) tests/browser/chromium.py

check: lint  ## the quick part: lint, module order, packaging, notebook hygiene
	$(RUN) -m pytest -q $(HYGIENE)

lint: $(INSTALLED)  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

notebooks: $(INSTALLED)  ## execute every notebook in place and stamp it with the hash of its source
	$(RUN) notebooks/stamp.py $(ARGS)

bench: $(INSTALLED)  ## side-by-side figures (ARGS names one benchmark)
	$(RUN) -m benchmarks $(ARGS)

falconet: $(INSTALLED)  ## retrain the embedded models from generated text, up to 90 minutes on two cores
	$(RUN) -m falcon_kit.falconet.corpus
	$(RUN) -m falcon_kit.falconet.pretrain
	$(RUN) -m falcon_kit.falconet.finetune
	$(RUN) -m falcon_kit.falconet.evaluate

clean:  ## remove caches and build products; .venv, runs/ and .falconet/ stay
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'Falcon Kit needs Python 3.11 or newer; "$(PYTHON)" is not. Name another one: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -c constraints.txt -e ".[lab,sagemaker,dev]"
	@touch $@
