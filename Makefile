# Two commands: `make demo` and `make test`. Both create .venv on their first run and reuse it.
# `make demo-bridge` and `make test-bridge` do the same with Megatron-Bridge, in .venv-bridge.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
CONSTRAINTS ?= constraints.txt
PIP_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
PYTHON312 ?= $(shell for python in python3.12 python3 $(HOME)/.pyenv/versions/3.12*/bin/python; do \
    "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo "$$python" && break; done)
BRIDGE_CONSTRAINTS ?= constraints-bridge.txt
BRIDGE := .venv-bridge/bin
BRIDGE_STAMP := .venv-bridge/.installed
# By its path, so that a script beside the checkout finds the package and not the folder of the same name.
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
EDITABLE := --config-settings editable_mode=compat --editable
INSTALL = $(BIN)/python $(PIP_INSTALL) --constraint $(CONSTRAINTS) $(PIP_ARGS) $(EDITABLE)
BRIDGE_INSTALL = $(BRIDGE)/python $(PIP_INSTALL) --constraint $(BRIDGE_CONSTRAINTS) $(PIP_ARGS)
# One thread a process: ranks share the cores, and worlds are forked (OpenMP threads do not survive a fork).
RUN := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore

# As many tests at a time as there are cores, and at most four; the tests of a file stay together.
WORKERS := --numprocesses logical --maxprocesses 4 --dist loadfile

.PHONY: demo demo-bridge test test-bridge test-long test-slurm coverage versions compat imports docs lint clean

demo: $(STAMP)
	@$(RUN) $(BIN)/skymoe demo

demo-bridge: $(BRIDGE_STAMP)
	@$(RUN) $(BRIDGE)/skymoe demo --frontdoor bridge --output runs/demo-bridge

test: $(STAMP)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/pyright & types=$$!; $(RUN) $(BIN)/pytest $(WORKERS) -m "not long"; tests=$$?; \
	    wait $$types && exit $$tests

# What needs Megatron-Bridge: types and tests; writes tests/logs/test-bridge.log.
test-bridge: $(BRIDGE_STAMP)
	@$(RUN) bash tests/logged.sh test-bridge bash tests/bridge/all.sh

# The same tests, and which lines of the package they and the first of their ranks run; twice as long.
coverage: $(STAMP)
	@$(RUN) $(BIN)/pytest $(WORKERS) --cov --cov-report=term -m "not long"

# The full grids, which `make test` leaves out; writes tests/logs/test-long.log.
test-long: $(STAMP)
	@$(RUN) bash tests/logged.sh test-long $(BIN)/pytest -m long --durations=20

# A real SLURM on loopback, which preempts, stops and loses trainings of both doors. As root; it says which packages it needs.
# Writes tests/logs/test-slurm.log.
test-slurm: $(STAMP) $(BRIDGE_STAMP)
	@$(RUN) bash tests/logged.sh test-slurm $(BIN)/pytest tests/slurm --durations=20

# What needs neither NeMo nor Bridge, with every Megatron-Core; writes tests/logs/versions.log and benchmarks/versions.md.
versions: $(STAMP) $(BRIDGE_STAMP)
	@bash tests/logged.sh versions bash tests/versions.sh; status=$$?; $(BIN)/python -m tests.versions_table; exit $$status

# Every supported pair of NeMo and megatron-core in its own environment, once 700 MB; writes benchmarks/compat.md.
compat: $(STAMP)
	@PIP_ARGS="$(PIP_ARGS)" $(RUN) $(BIN)/python -m tests.compat.run $(PAIRS)

# The picture of who imports whom, into docs/imports.svg.
imports: $(STAMP)
	@$(BIN)/python -m benchmarks.imports

# The site, into build/docs; a warning is an error.
docs: .venv/.docs
	@$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet docs build/docs
	@echo build/docs/index.html

lint: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/pyright

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@uname -sm | grep -qx 'Linux x86_64' || { echo "nemo_skymoe needs Linux on x86-64, this is $$(uname -sm)."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	    { echo "nemo_skymoe needs Python 3.11 or 3.12, '$(PYTHON)' is another: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into .venv: about 4 minutes and 3 GB, once."
	@$(PYTHON) -m venv --clear .venv
	@$(INSTALL) '.[nemo,dev]'
	@touch $@

.venv/.docs: $(STAMP)
	@$(INSTALL) '.[docs]'
	@touch $@

# Bridge's metadata demand packages that need a GPU, so that what it imports is the extra `bridge`. The wheel of
# nvidia-resiliency-ext names a newer glibc than its Python part needs, and the older ones end the import of Megatron-Core.
$(BRIDGE_STAMP): pyproject.toml $(BRIDGE_CONSTRAINTS)
	@uname -sm | grep -qx 'Linux x86_64' || { echo "nemo_skymoe needs Linux on x86-64, this is $$(uname -sm)."; exit 1; }
	@'$(PYTHON312)' -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || \
	    { echo "Megatron-Bridge needs Python 3.12, '$(PYTHON312)' is none: make PYTHON312=/path/to/python3.12"; exit 1; }
	@echo "Installing into .venv-bridge: about 5 minutes and 6 GB, once."
	@'$(PYTHON312)' -m venv --clear .venv-bridge
	@$(BRIDGE_INSTALL) $(EDITABLE) '.[bridge,dev]'
	@$(BRIDGE_INSTALL) --no-deps megatron-bridge
	@$(BRIDGE_INSTALL) --no-deps --only-binary=:all: --platform manylinux_2_39_x86_64 nvidia-resiliency-ext \
	    --target "$$($(BRIDGE)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@

clean:
	rm -rf .venv .venv-bridge build runs
