# Two commands do everything on a machine with git, make and Python 3.11: `make demo` and `make test`.
# Each builds .venv first (once; constraints/venv.py), from exact versions.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# On a CUDA host the interpreter that has a CUDA PyTorch comes first, so that .venv keeps that build.
PYTHON ?= $(shell for each in python3 python3.11 python3.12 python3.13; do \
	p=$$(command -v $$each) && $$p -c 'import torch, sys; sys.exit(not torch.version.cuda)' 2>/dev/null && { echo $$p; exit; }; done; \
	command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
TIERS := $(wildcard tests/unit tests/interpret tests/compile tests/integration)
VLLM ?= 1
BENCH_ROWS ?= bench/results/cpu_decode.jsonl

.PHONY: help demo test lint pytest reliability break-it test-oldest bench-cpu guide vllm test-vllm clean venv-demo venv-test

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: venv-demo ## a real MLA model through the paged latent cache, checked against transformers; writes an HTML report
	@$(BIN)/openmla demo $(ARGS)

test: venv-test lint pytest vllm ## everything this machine can check: lint, types, import contracts, all test tiers, vLLM

lint: venv-test ## ruff, formatting, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

pytest: venv-test ## the test tiers alone; ARGS="-k name" narrows
	@gpu=$$($(BIN)/python -c 'import torch; print("tests/gpu" if torch.cuda.is_available() else "")'); \
	[ -n "$$gpu" ] || echo "tests/gpu: not collected, PyTorch sees no CUDA device here"; \
	$(BIN)/python -m pytest $(TIERS) $$gpu $(ARGS)

reliability: venv-test ## the CPU reliability suite, two processes; record in build/reliability.json
	@$(BIN)/python tests/reliability/suite.py $(ARGS)

break-it: venv-test ## hostile tensors, killed processes, corrupted caches, a full disk, a lying metrics client
	@$(BIN)/python tests/reliability/break_it.py $(ARGS)

# The oldest PyTorch of the range; TORCH=2.13.0 where an index no longer has it.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints/oldest.txt)
OLDEST := .venv-oldest/bin/python
test-oldest: ## the lower end of every dependency range in an environment of its own; make test is the upper end
	@$(PYTHON) -m venv .venv-oldest
	@grep -v '^torch==' constraints/oldest.txt > .venv-oldest/constraints.txt
	@$(OLDEST) -m pip install -q torch==$(TORCH) -c .venv-oldest/constraints.txt
	@$(OLDEST) -m pip install -q -e '.[cuda,monitor,triton]' pytest hypothesis numpy pytest-timeout pytest-xdist packaging \
		-c .venv-oldest/constraints.txt torch==$(TORCH)
	@$(OLDEST) -m pip list 2>/dev/null | grep -iE 'torch|triton|tvm|cutlass-dsl |prometheus|nvidia-ml'
	@$(OLDEST) -m pytest -q -n 2 tests/interpret $(foreach t,native flash_mla kv schedule combine quant torch_backend \
		cute_decode diskcache faults_kernels monitor checks rollout library,tests/unit/test_$(t).py) $(ARGS)

bench-cpu: venv-test ## the CPU decode beside gather + SDPA and the bare GEMMs; appends rows to bench/results
	$(BIN)/openmla bench --suite cpu_decode --peer sdpa --peer matmul --peer eager --out $(BENCH_ROWS) $(ARGS)

guide: venv-test ## the guide as a site, English and Chinese, offline: build/guide/index.html
	@$(BIN)/python guide/site/build.py $(ARGS)

vllm: # 3.5 GB and some minutes, once; where vLLM cannot be had it says why and passes; VLLM=0 leaves it out
	@[ "$(VLLM)" = 0 ] && echo "vllm: left out, VLLM=0" || $(PYTHON) constraints/vllm.py

test-vllm: ## a tiny DeepSeek through vLLM on a CPU, in process and over HTTP; 3.5 GB, Python 3.11; an error where it cannot be had
	@$(PYTHON) constraints/vllm.py --must $(ARGS)

clean: ## remove .venv and every cache
	rm -rf .venv .venv-vllm build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

venv-demo:
	@$(PYTHON) constraints/venv.py demo

venv-test:
	@$(PYTHON) constraints/venv.py test
