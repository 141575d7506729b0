# make demo    sets everything up and compresses the bundled Llama
# make test    sets everything up and runs the tests
#
# A second run finds the environment ready. An existing environment, with its own torch, is used as it is found:
#   make demo VENV=~/my-env
# Which build of torch is installed where there is none is pip's choice; TORCH_ARGS adds arguments to that one call,
# for example an index of CPU-only or CUDA builds:
#   make setup TORCH_ARGS="--index-url …"

VENV ?= .venv
# the first that runs and is new enough; the pins of constraints.txt were made with 3.11
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
TORCH_ARGS ?=
ARGS ?=
# how many processes share the tests
WORKERS ?= 2

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet
STAMP = $(VENV)/.llmcompress-ready

.PHONY: setup demo test check format browser bench-setup clean

setup: $(STAMP)

# torch comes first and by itself: what follows then keeps it, whichever version and build it is.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { echo "no Python 3.10 or newer found; say where: make PYTHON=…"; exit 2; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c "import torch" 2>/dev/null || { echo "installing torch"; $(PIP) -c constraints.txt $(TORCH_ARGS) torch; }
	@echo "installing llmcompress and what it needs, pinned by constraints.txt (some minutes the first time)"
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints-without-torch.txt
	@$(PIP) -c $(VENV)/constraints-without-torch.txt -e '.[all]'
	@touch $@

demo: setup
	$(BIN)/python -m llmcompress --model llama --force $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# The tests open the pages in Chromium, and skip that where there is none. Installed only as root, by apt.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		command -v $$name >/dev/null && exit 0; done; \
	test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& { echo "installing chromium"; export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >&2 \
		|| echo "no chromium: the pages will not be opened in a browser"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# llm-compressor pins older transformers and compressed-tensors than constraints.txt: benchmarks run it from here.
bench-setup: .venv-bench/.ready
.venv-bench/.ready: pyproject.toml
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	@.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet -e '.[bench]'
	@touch $@

clean:
	rm -rf .venv .venv-bench build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
