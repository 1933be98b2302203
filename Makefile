# `make demo` and `make test` set up all they need: Python 3.11 or later with pip is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes of `make test`, of one thread each.
WORKERS ?= 2
# Of `make reproduce`: minutes, hours or gpu.
SCALE ?= minutes
# Of `make test-common`: the folder `tests` of transformers' repository (tests/transformers_common/README.md).
TRANSFORMERS_TESTS ?=

# Of `make app`, `make space` and `make pictures`: a folder, or for `make app` a name on the Hub.
MODEL ?= outputs/quickstart

.PHONY: demo app space pictures test test-all test-common lint docs bench gpu reproduce clean

demo: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python examples/quickstart.py

app: $(VENV)/installed
	$(BIN)/python examples/app.py --model $(MODEL)

# What can be pushed as a Space: the page, its header and requirements, and a model with its code.
space:
	rm -rf build/space
	mkdir -p build/space
	cp examples/app.py examples/app_view.py examples/holes.py examples/space/* build/space
	mkdir build/space/model
	find $(MODEL) -maxdepth 1 -type f ! -name '*.jsonl' -exec cp {} build/space/model ';'

# Of the page, for docs/app.md: needs Chromium.
pictures: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python docs/film_app.py --model $(MODEL)

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS)

test-all: test docs
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow --numprocesses $(WORKERS) --dist loadfile

lint: $(VENV)/installed $(VENV)/source/eso_lm
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A broken link or an unknown name of the reference is an error. The copies keep the paths of the repository.
docs: $(VENV)/installed
	rm -rf build/docs site
	mkdir -p build/docs/pages build/docs/source/eso_lm
	cp *.py build/docs/source/eso_lm
	tar -cf - --exclude '*.py' README.md LICENSE docs benchmarks/results examples/README.md tests/*/README.md \
		| tar -xf - -C build/docs/pages
	$(BIN)/zensical build --strict --clean

test-common: $(VENV)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_TESTS=$(abspath $(TRANSFORMERS_TESTS)) \
		$(BIN)/python -m pytest tests/transformers_common

bench: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/speed.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/context_growth.py

# With the Python at hand, which has a torch for the GPU; nothing is installed.
gpu:
	HF_HUB_OFFLINE=1 $(PYTHON) benchmarks/gpu.py

reproduce: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/reproduce.py --scale $(SCALE)

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# For tools that know a package by its folder: whatever the repository root is called, here it is `eso_lm`.
$(VENV)/source/eso_lm: | $(VENV)/installed
	mkdir -p $(@D)
	ln -sfn ../.. $@

clean:
	rm -rf $(VENV) outputs build site .cache *.egg-info
