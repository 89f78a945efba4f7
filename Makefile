# `make demo` and `make test` do all their own set-up. PYTHON=... chooses the interpreter.
export PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXAMPLES := demo:demo-cpu qwen3.5-397b-b200x8:qwen3.5-397b-b200x8 qwen3.5-35b-h200:qwen3.5-35b-h200

.PHONY: demo test lint plans check-plans
.DELETE_ON_ERROR:

$(VENV)/demo.stamp: pyproject.toml constraints-cpu.txt tools/make_venv.sh
	tools/make_venv.sh $(VENV) $@

$(VENV)/test.stamp: pyproject.toml constraints-cpu.txt tools/make_venv.sh
	tools/make_venv.sh $(VENV) $@ test

$(VENV)/dev.stamp: pyproject.toml constraints-cpu.txt tools/make_venv.sh
	tools/make_venv.sh $(VENV) $@ test,dev

demo: $(VENV)/demo.stamp
	$(BIN)/tokenspeed plan examples/demo/spec.yaml -o plans/frozen/demo-cpu
	$(BIN)/tokenspeed run plans/frozen/demo-cpu --input examples/demo/batch.jsonl --output out.jsonl
	@echo "the answers are in $(CURDIR)/out.jsonl; the first one:"
	@head -n 1 out.jsonl | $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["response"]["body"]["choices"][0]["text"])'

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy -p tokenspeed_plan.plans -p tokenspeed_plan.codegen -p tokenspeed_plan.runtime -p tokenspeed_plan.planner

plans: $(VENV)/demo.stamp
	@set -e; for pair in $(EXAMPLES); do \
	  $(BIN)/tokenspeed plan examples/$${pair%%:*}/spec.yaml -o plans/frozen/$${pair##*:}; done

check-plans: $(VENV)/demo.stamp
	@set -e; for pair in $(EXAMPLES); do \
	  $(BIN)/tokenspeed plan examples/$${pair%%:*}/spec.yaml -o plans/frozen/$${pair##*:} --check; done
