# Every target does its own set-up. PYTHON=... chooses the interpreter.
export PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXAMPLES := demo:demo-cpu qwen3.5-397b-b200x8:qwen3.5-397b-b200x8 qwen3.5-35b-h200:qwen3.5-35b-h200 \
  qwen3.5-35b-fp8-h200:qwen3.5-35b-fp8-h200 qwen3.5-122b-h200x2:qwen3.5-122b-h200x2 \
  qwen3.5-397b-h200x8:qwen3.5-397b-h200x8

# A stamp belongs to this folder and this interpreter. In a copy of the folder, and with another
# interpreter, it is missing, and the environment is made again.
IDENTITY := import os, sys; print(sys.version_info[:2], os.path.realpath(sys.base_prefix))
PLACE := $(shell { pwd -P; "$(PYTHON)" -c '$(IDENTITY)' 2>/dev/null; } | cksum | cut -d ' ' -f 1)
SETUP := pyproject.toml constraints-cpu.txt tools/make_venv.sh
STAMP := $(VENV)/stamp-$(PLACE)

.PHONY: demo quick test lint plans check-plans
.DELETE_ON_ERROR:
.NOTPARALLEL:

# An environment with more extras also serves the targets that need fewer.
$(STAMP)-run: $(SETUP)
	tools/make_venv.sh $(VENV) $@

$(STAMP)-test: $(SETUP)
	tools/make_venv.sh $(VENV) $@ test
	@touch $(STAMP)-run

$(STAMP)-dev: $(SETUP)
	tools/make_venv.sh $(VENV) $@ test,dev
	@touch $(STAMP)-run $(STAMP)-test

demo: $(STAMP)-run
	$(BIN)/tokenspeed plan examples/demo/spec.yaml -o plans/frozen/demo-cpu
	@rm -f out.jsonl
	$(BIN)/tokenspeed run plans/frozen/demo-cpu --input examples/demo/batch.jsonl --output out.jsonl
	@echo "the answers are in $(CURDIR)/out.jsonl; the first one:"
	@head -n 1 out.jsonl | $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["response"]["body"]["choices"][0]["text"])'
	@echo "the command is $(CURDIR)/$(BIN)/tokenspeed; try: $(BIN)/tokenspeed --help"

# Tests of a module share what it has made, so they stay together until a worker has nothing to do.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

# The tests that are not marked `slow`: some two minutes on two cores.
quick: $(STAMP)-test
	$(PYTEST) -m "not slow"

test: $(STAMP)-test
	$(PYTEST)

lint: $(STAMP)-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pyright

plans: $(STAMP)-run
	@set -e; for pair in $(EXAMPLES); do \
	  $(BIN)/tokenspeed plan examples/$${pair%%:*}/spec.yaml -o plans/frozen/$${pair##*:}; done

# Each plan is compiled twice from nothing: the compiler gives the same bytes every time.
check-plans: $(STAMP)-run
	@set -e; for pair in $(EXAMPLES); do for round in 1 2; do \
	  cache=$$(mktemp -d); trap 'rm -rf "$$cache"' EXIT; \
	  TOKENSPEED_CACHE=$$cache $(BIN)/tokenspeed plan examples/$${pair%%:*}/spec.yaml -o plans/frozen/$${pair##*:} --check; \
	  rm -rf "$$cache"; \
	done; done
