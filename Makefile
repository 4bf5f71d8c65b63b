# make demo: set up and run the main job on the shipped model. make test: set up and check everything.
# Each installs exactly what locks/ names; `make lock` writes the locks anew.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
# further words for pip where it gets torch, such as another index with a smaller build
TORCH_PIP ?=
TRITON := $(shell uname -s | grep -q Linux && echo triton)

.PHONY: demo test quick test-slow setup setup-run lint format types peak-memory under-eviction league peers real \
	heavy-hitters fastgen test-parity test-compat test-newest test-offline check-install lock \
	train-demo-model clean bench-decode bench-kernel bench-prefill bench-fixed-memory bench-scaling \
	bench-host-overhead bench-vllm performance-page

demo: setup-run
	$(BIN)/kvcompress demo

# One thread for each of two workers: two threads each would wait for one another on two cores.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"
test: lint types
	$(TESTS)

# The same without any network but this machine's own, which processes of one test meet on.
test-offline: setup
	unshare --net --map-root-user sh -c 'ip link set lo up && $(TESTS)'

# What a contributor runs while editing: a few tests of every part of the package, under a minute.
quick: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile \
		-m "not slow and not gpu" $$($(BIN)/python -m tests.quick)

# The README's walk-through and the demo's figures on the shipped model: minutes.
test-slow: setup
	$(BIN)/python -m pytest -m slow

# Every family of models in every way of calling it, against transformers and an oracle: minutes.
test-parity: setup
	OMP_NUM_THREADS=1 $(BIN)/python tools/parity.py --markdown docs/families.md
	OMP_NUM_THREADS=1 $(BIN)/python tools/capabilities.py --markdown docs/capabilities.md

# The oldest and the last but one supported transformers, then the newest: what touches transformers.
COMPAT := .venv-5.17 .venv-5.23
TOUCHES := tests/runtime tests/bundle tests/profile tests/evict
test-compat: setup $(COMPAT:%=%/.built)
	for venv in $(COMPAT) $(VENV); do echo "== $$venv"; OMP_NUM_THREADS=1 $$venv/bin/python -m pytest \
		-n 2 --dist loadfile -m "not slow and not gpu" $(TOUCHES) || exit 1; done
	OMP_NUM_THREADS=1 .venv-5.17/bin/python tools/parity.py --markdown docs/families-oldest.md

# The newest release of everything, in the supported range and beyond it: what will break next.
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet $(TORCH_PIP) torch
	.venv-newest/bin/python -m pip install --quiet -e '.[dev]'
	.venv-newest/bin/python -m pip install --quiet --upgrade transformers
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist loadfile \
		-m "not slow and not gpu" --deselect tests/test_packaging.py

# An environment is made anew when its lock changes or its set-up was interrupted. torch comes after
# everything that it shares with others, so that nothing else chooses its build or their versions.
define make-env # environment, lock, packages beside it
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed: install it or run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@rm -f $(1)/.env $(1)/.run $(1)/.built
	@echo "setting up $(1): every package that locks/$(2).txt names"
	@$(PYTHON) -m venv --clear $(1) && date +%s > $(1)/.begun
	@$(1)/bin/python -m pip install --quiet --no-deps --require-hashes -r locks/$(2).txt
	@$(1)/bin/python -m pip install --quiet $(TORCH_PIP) -c locks/torch.txt torch $(3)
endef
define build # environment
	@$(1)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@if test -f $(1)/.begun; then echo "$(1): set up in $$(($$(date +%s) - $$(cat $(1)/.begun))) s," \
		"$$(du -sm $(1) | cut -f1) MB"; rm $(1)/.begun; fi
endef
SOURCES := pyproject.toml $(wildcard kvcompress/kernels/cpu/src/*)

setup: $(VENV)/.built

# `make demo` needs less than the tests, and takes an environment that has more as it is.
setup-run:
	@if test -f $(VENV)/.env; then $(MAKE) --no-print-directory setup; \
	else $(MAKE) --no-print-directory $(VENV)/.run; fi

$(VENV)/.run: locks/run.txt locks/torch.txt $(SOURCES)
	$(call make-env,$(VENV),run,)
	$(call build,$(VENV))
	@touch $@

$(VENV)/.env: locks/test.txt locks/torch.txt
	$(call make-env,$(VENV),test,$(TRITON))
	@touch $@

$(COMPAT:%=%/.env): .venv-%/.env: locks/test-%.txt locks/torch.txt
	$(call make-env,.venv-$*,test-$*,$(TRITON))
	@touch $@

.venv-league/.env: locks/league.txt locks/torch.txt
	$(call make-env,.venv-league,league,)
	@touch $@

%/.built: %/.env $(SOURCES)
	$(call build,$*)
	@touch $@

# uv only resolves: pip installs, because it also takes builds that lie on this machine.
lock:
	test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install --quiet uv; }
	$(PYTHON) tools/lock.py --uv .venv-lock/bin/uv

# Wheel and source distribution, each installed in a clean environment of every Python that is here.
check-install: setup
	$(BIN)/python tools/check_install.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resident memory of one long generation, compressed cache against DynamicCache.
peak-memory: setup
	$(BIN)/python benchmarks/peak_memory.py

# What chunked prefill and drafts change once tokens are evicted.
under-eviction: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/under_eviction.py --json benchmarks/results/under_eviction.json

# Every recipe at equal measured bytes on every workload, then the committed results and their page.
# About two hours on two cores; stopped, it goes on where it was. In an environment of its own: where
# hqq is installed, importing transformers warns, and the tests take warnings for errors.
JOBS ?= 2
LEAGUE := benchmarks/results/league.json
LEAGUE_BIN := .venv-league/bin
league: .venv-league/.built
	OMP_NUM_THREADS=1 $(LEAGUE_BIN)/kvcompress league kvcompress/demo/model -o runs/league --jobs $(JOBS)
	cp runs/league/league.json $(LEAGUE)
	$(LEAGUE_BIN)/python benchmarks/league_page.py

# Pretrained models at equal bytes: results and docs/real-models.md. Stopped, it goes on where it was.
# REAL names directories of models; WITH has more words for the script, such as --quick.
REAL ?= $(addprefix $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kvcompress/models/,smollm2-135m qwen2.5-coder-0.5b)
real: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/real.py $(REAL:%=--model %) --jobs $(JOBS) $(WITH)

# The same situations on kvpress, in an environment of its own, and on kvcompress: results and docs/peers.md.
PEERS := benchmarks/peers
.venv-kvpress/.setup: $(PEERS)/requirements-kvpress.txt
	test -x .venv-kvpress/bin/python || $(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/python -m pip install --quiet -r $(PEERS)/requirements-kvpress.txt
	@touch $@

peers: setup .venv-kvpress/.setup
	.venv-kvpress/bin/python $(PEERS)/run.py kvpress
	$(BIN)/python $(PEERS)/run.py kvcompress
	$(BIN)/python $(PEERS)/report.py

# Side by side on the shipped model, half an hour each on one core: docs/heavy-hitters.md, docs/fastgen.md.
heavy-hitters fastgen: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$(subst -,_,$@).py

# Speed beside transformers' caches, kvpress and vLLM: benchmarks/results/speed/ and docs/performance.md.
# Leave the machine alone meanwhile. Stopped, a benchmark goes on with the cells that it lacks.
SPEED := benchmarks/speed
.venv-quant/.setup: $(SPEED)/requirements-quant.txt
	test -x .venv-quant/bin/python || $(PYTHON) -m venv .venv-quant
	.venv-quant/bin/python -m pip install --quiet -r $(SPEED)/requirements-quant.txt
	@touch $@

# vLLM without the packages for pictures and sound, which would bring another build of torch.
VLLM := benchmarks/vllm_cpu
.venv-vllm/.setup: $(VLLM)/requirements.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet --no-deps -r $(VLLM)/requirements.txt
	.venv-vllm/bin/python $(VLLM)/requirements.py > .venv-vllm/more.txt
	.venv-vllm/bin/python -m pip install --quiet -r .venv-vllm/more.txt torch==2.13.0
	@touch $@

bench-decode bench-prefill bench-fixed-memory: setup .venv-quant/.setup .venv-kvpress/.setup .venv-vllm/.setup
bench-kernel bench-scaling bench-host-overhead: setup
bench-decode bench-kernel bench-prefill bench-fixed-memory bench-scaling bench-host-overhead:
	$(BIN)/python benchmarks/$(subst -,_,$(@:bench-%=%)).py

# A look at vLLM beside the fastest of the others; not the committed results.
bench-vllm: setup .venv-vllm/.setup
	$(BIN)/python benchmarks/decode.py --cells 4096x1,16384x1,1024x8 --results runs/speed/vllm \
		--only vLLM --only StaticCache --only 'int8 20 %' --only 'planned 1/8'

performance-page: setup
	$(BIN)/python benchmarks/performance_page.py

# Hours on a CPU, minutes on a GPU; goes on from its last checkpoint when run again.
MINUTES ?= 100
DEVICE ?= cpu
train-demo-model: setup
	$(BIN)/python tools/train_demo_model.py -o out/demo --minutes $(MINUTES) --device $(DEVICE)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
