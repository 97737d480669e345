# Every target does its own set-up, once: what has not changed is not installed or built again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
APP := $(VENV)/app
OLDEST := 3.6.0
OLDEST_TRITON := $(VENV)/triton-$(OLDEST)
NATIVE := setup.py $(shell find csrc bindings -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.map' -o -name 'build.py')
PYTHON_SOURCES := $(shell find dense_attn triton_kernels benchmarks examples -name '*.py')
SANITIZED := build/sanitize
SANITIZER_ENV = PYTHONPATH=$(SANITIZED)/lib PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=2 \
	LD_PRELOAD="$(shell $(or $(CXX),c++) -print-file-name=libasan.so) $(shell $(or $(CXX),c++) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1

PTX_FILES := $(patsubst %,tests/backends/%.py,test_backends triton_attention triton_lists gpu_sega gpu_steps triton_backend)
PTX_TABLE = $(BIN)/pytest -q --numprocesses=auto -p ptx.plugin $(PTX_FILES) -m "full or not full" -k "not (cpu or cuda)"
CUDA_FILES := $(patsubst %,tests/backends/%.py,test_backends gpu_sega gpu_steps)
CUDA_TABLE = $(BIN)/pytest -q --numprocesses=auto -p cuda.plugin $(CUDA_FILES) -m "full or not full" -k "cuda"

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench kernels ptx wheel compat hub ci gpu fuzz sanitize browser clean

help:  ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.built  ## layout attention on a real layout: a table and a picture
	@$(BIN)/python -m dense_attn demo $(ARGS)

test: $(VENV)/.built $(if $(findstring full,$(ARGS)),$(OLDEST_TRITON)/.installed)  ## the test suite (ARGS="-k name" for a part, "-m full" for the rest)
	@$(BIN)/pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder -m "not full" $(ARGS)

lint: $(VENV)/.installed  ## ruff, clang-format and the rules of .pre-commit-config.yaml, over all files
	@git ls-files -z --cached --others --exclude-standard --deduplicate | \
		PRE_COMMIT_HOME=$(CURDIR)/$(VENV)/pre-commit xargs -0 $(BIN)/pre-commit run --files

docs: $(VENV)/.docs  ## the documentation as a site, in build/docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs --quiet build --strict --config-file .mkdocs.yml
	@echo "wrote build/docs/index.html"

bench: $(VENV)/.built  ## the benchmark suite (ARGS="--json FILE --plot FILE"; "--shape B,H,M,N,D")
	@$(BIN)/python -m dense_attn bench $(ARGS)

gpu:  ## on a machine with a GPU: build, test and measure in 9 minutes, no network needed (ARGS="--minutes 60", "--dry-run")
	@$(PYTHON) .ci/gpu.py $(ARGS)

kernels: $(VENV)/.built $(OLDEST_TRITON)/.installed  ## compile the Triton and CUDA kernels for GPUs that are not here: a table
	@$(BIN)/python -m dense_attn.benchmarks.compiled.kernel_table --triton $(OLDEST_TRITON) --json benchmarks/results/kernels.json
	@$(BIN)/python -m dense_attn.benchmarks.compiled.cuda_table --json benchmarks/results/kernels.json

ptx: $(VENV)/.built  ## every case on the kernels as compiled for sm_80 and sm_90, emulated: hours (ARGS="-k name")
	@$(BIN)/pytest -q --numprocesses=auto tests/ptx -m "full or not full" -k "not emulated"
	@for target in sm_80 sm_90; do $(PTX_TABLE) --ptx-target $$target --ptx-order each $(ARGS) || failed=1; done; \
		$(CUDA_TABLE) --cuda-order each $(ARGS) || failed=1; exit $${failed:-0}

wheel: $(VENV)/.wheel  ## the source distribution and, from it, a wheel for every Python 3, in dist (ARGS="--cross aarch64")
	@$(BIN)/python .ci/wheels.py $(ARGS)

compat: $(VENV)/.wheel  ## that wheel beside torch 2.11, 2.13 and the newest on three Pythons: core tests, verify, docs/compatibility.md
	@$(BIN)/python .ci/compat.py

hub: $(VENV)/.built  ## the kernels in the layout of Hugging Face's kernels, in build/hub
	@$(BIN)/python .ci/hub.py $(ARGS)

ci:  ## what continuous integration runs: lint, the suite, the most of its full part, fuzz
	@.ci/run

fuzz: $(SANITIZED)/.built  ## 10,000 fuzzed calls under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(SANITIZER_ENV) $(BIN)/python tests/support/fuzz.py --calls 10000

sanitize: fuzz  ## the same, and the whole table of cases
	@$(SANITIZER_ENV) $(BIN)/pytest -q -p no:cacheprovider tests/backends/test_backends.py

browser: $(VENV)/.built $(APP)/.installed  ## the page of `python -m dense_attn app` in a real browser (installs Debian's chromium where none is)
	@command -v chromium >/dev/null || { apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium; } >/dev/null 2>&1 \
		|| echo "chromium is not here, and apt-get could not install it: what needs a browser is skipped" >&2
	@PYTHONPATH=$(APP) $(BIN)/pytest -q tests/app/browser $(ARGS)

clean:  ## remove what was built and installed here
	rm -rf $(VENV) build dist *.egg-info dense_attn/_C*.so dense_attn/_CUDA*.so .pytest_cache .ruff_cache .hypothesis .benchmarks

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("dense_attn needs Python 3.10 or newer: make PYTHON=python3.x" if sys.version_info < (3, 10) else 0)'
	@echo "Installing the development environment into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet pip==26.3
	@$(PIP) install --quiet --group dev
	@touch $@

$(VENV)/.docs: $(VENV)/.built
	@echo "Installing what the documentation needs"
	@$(PIP) install --quiet --group docs
	@touch $@

$(VENV)/.wheel: $(VENV)/.installed
	@echo "Installing what a wheel needs"
	@$(PIP) install --quiet --group wheel
	@touch $@

# Without a compiler setup.py leaves the CPU kernels out, of which a developer would not hear.
$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	@echo "Building dense_attn"
	@DENSE_ATTN_CPU_KERNELS=$${DENSE_ATTN_CPU_KERNELS:-1} $(PIP) install -qq --no-build-isolation --no-deps --editable .
	@touch $@

# The oldest Triton that the kernels work with, beside the development environment's.
$(OLDEST_TRITON)/.installed: $(VENV)/.installed
	@echo "Installing Triton $(OLDEST)"
	@rm -rf $(OLDEST_TRITON)
	@$(PIP) install --quiet --no-deps --target $(OLDEST_TRITON) triton==$(OLDEST)
	@touch $@

# What the page needs, in a folder of its own, for it takes an older pillow than the development environment's.
$(APP)/.installed: pyproject.toml $(VENV)/.installed
	@echo "Installing what the page needs into $(APP)"
	@rm -rf $(APP)
	@$(PIP) install --quiet --target $(APP) --group app
	@touch $@

$(SANITIZED)/.built: $(VENV)/.installed $(NATIVE) $(PYTHON_SOURCES)
	@echo "Building dense_attn with sanitizers"
	@rm -rf $(SANITIZED)
	@DENSE_ATTN_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	@touch $@
