# make test and make bench do all the set-up: virtual environment, pinned dependencies, build.
# PYTHON=/path/to/python uses that environment instead: no virtual environment, no pip, no network, only the build.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
ifdef PYTHON
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

# One test process per core, each with one thread: kernels are too small in tests to repay more.
JOBS := $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q $$($(PY) -c 'import xdist' 2>/dev/null && echo "-n $(JOBS)")
FAST := not gpu and not slow

OUT ?= gpu-results
PARTS ?= env,ceilings,tests,primitives,steps,blocks,resnet50,evaluation

.PHONY: help build test test-all test-range test-torch-min test-torch-max sanitize bench suites results verify profile gpu lint wheel \
  clean

help:
	@echo 'make test        tests that need no GPU and are not slow'
	@echo 'make test-all    slow tests too, and the range of torch at both ends'
	@echo 'make test-range  the tests with the oldest and the newest torch declared'
	@echo 'make sanitize    the C++ kernels under the address and undefined-behaviour sanitizers'
	@echo 'make bench       correctness gate, then time and memory; FULL=1 for every case, BENCH_ARGS=... for options'
	@echo 'make bench COMPARE=REVISION   this tree and another revision, step by step in turn'
	@echo 'make results     what is above and more, as files in OUT=folder: hours'
	@echo 'make suites      primitives, blocks and networks under pytest-benchmark; FULL=1 for all of them'
	@echo 'make verify      train a small network, eager and fused from the same start'
	@echo 'make profile     a steady window of ResNet-50 steps under nsys, with its reports; PROFILE_ARGS=... OUT=folder'
	@echo 'make gpu         everything that needs a GPU; OUT=folder PARTS=$(PARTS)'
	@echo 'make lint, make wheel, make build, make clean'
	@echo 'PYTHON=/path/to/python uses an existing environment and no network.'

# Python, compiler, environment -----------------------------------------------------------------------------------

define find_python
for p in python3 python3.13 python3.12 python3.11 python3.10; do \
  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found=$$p; break; fi; \
done; \
if [ -z "$${found:-}" ]; then \
  echo "resfuse needs Python 3.10 or newer; none was found on PATH (python3: $$(python3 --version 2>/dev/null || echo absent))." >&2; \
  exit 1; \
fi
endef

$(VENV)/.installed: requirements.txt
	@$(find_python); \
	echo "Installing the pinned environment into $(VENV) with $$found"; \
	$$found -m venv $(VENV) || { \
	  echo "$$found cannot make a virtual environment; install its venv package." >&2; exit 1; }; \
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

build: $(READY)
	@if [ "$${RESFUSE_NATIVE:-1}" = 1 ] && ! command -v $${CXX:-c++} >/dev/null; then \
	  echo "No C++ compiler ($${CXX:-c++}) was found; install one, set CXX, or set RESFUSE_NATIVE=0." >&2; exit 1; fi
	@PYTHONWARNINGS=ignore $(PY) setup.py -q build_ext --inplace

# Jobs ------------------------------------------------------------------------------------------------------------

test: build
	@$(PYTEST) -m '$(FAST)'

test-all: build
	@$(PYTEST) -m 'not gpu'
	@$(MAKE) test-range

# Each end of the declared range runs in a copy of the tree, with a library built for its torch.
MIN := torch==2.7.1 torchvision==0.22.1
MAX := torch==2.15.0 torchvision==0.29.2

test-range: test-torch-min test-torch-max

test-torch-min test-torch-max: test-torch-%: .venv-torch-%/.installed
	@rm -rf build/torch-$* && mkdir -p build/torch-$*
	@git ls-files -co --exclude-standard -z | xargs -0 cp --parents -t build/torch-$*
	@$(MAKE) -C build/torch-$* test PYTHON=$(CURDIR)/.venv-torch-$*/bin/python

.venv-torch-min/.installed: WANTED = $(MIN)
.venv-torch-max/.installed: WANTED = $(MAX)
.venv-torch-%/.installed: requirements.txt Makefile
	@$(find_python); \
	echo "Installing $(WANTED) into .venv-torch-$*"; \
	$$found -m venv .venv-torch-$*; \
	grep -v -E '^(torch|torchvision)==' requirements.txt > .venv-torch-$*/rest.txt; \
	.venv-torch-$*/bin/python -m pip install -q --disable-pip-version-check $(WANTED) -r .venv-torch-$*/rest.txt
	@touch $@

# The C++ kernels under the sanitizers, in a copy of the tree. The runtimes must come before torch's own libraries.
SANITIZED := tests/test_kernels.py tests/test_cpu_kernels.py tests/test_native.py

sanitize: $(READY)
	@rm -rf build/sanitize && mkdir -p build/sanitize
	@git ls-files -co --exclude-standard -z | xargs -0 cp --parents -t build/sanitize
	@cd build/sanitize && RESFUSE_SANITIZE=1 $(abspath $(PY)) setup.py -q build_ext --inplace
	@cd build/sanitize && OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  $(abspath $(PY)) -m pytest -q -x -k 'cpu or test_native' -m 'not slow' $(SANITIZED)

# No speed is measured unless the gate passes.
bench: build
	@$(PYTEST) -m 'gate and not gpu'
ifdef COMPARE
	@$(PY) -m benchmarks.compare $(COMPARE) $(BENCH_ARGS)
else
	@$(PY) -m resfuse bench $(if $(FULL),--full) $(BENCH_ARGS)
endif

suites: build
	@$(PY) -m pytest benchmarks -q -p no:cacheprovider --benchmark-only $(if $(FULL),--full) \
	  --benchmark-group-by=group --benchmark-columns=median,iqr,rounds $(BENCH_ARGS)

results: build
	@$(PYTEST) -m 'gate and not gpu'
	@mkdir -p $(OUT)
	@$(PY) -m resfuse bench --full --json $(OUT)/bench.json --png $(OUT)/bench.png
	@$(PY) -m benchmarks.peers --out $(OUT)/peers.json
	@$(PY) -m benchmarks.families --out $(OUT)/families.json
	@$(PY) -m benchmarks.memory --out $(OUT)/memory.json
	@$(PY) -m benchmarks.convergence --out $(OUT)/convergence.json
	@$(PY) -m resfuse profile --out $(OUT)/profile
	@$(PY) -m resfuse roofline --json $(OUT)/roofline.json --png $(OUT)/roofline.png
	@$(MAKE) suites BENCH_ARGS=--benchmark-json=$(OUT)/suites.json

verify: build
	@$(PY) -m resfuse verify

NSYS_REPORTS := nvtx_gpu_proj_sum,cuda_gpu_kern_sum,cuda_gpu_mem_time_sum
PROFILE_ARGS ?= --mode autocast-bfloat16 --batch 256 --steps 5

profile: build
	@command -v nsys >/dev/null || { \
	  echo "make profile needs nsys on PATH (NVIDIA Nsight Systems); python -m resfuse profile does without." >&2; \
	  exit 1; }
	@mkdir -p $(OUT)
	@nsys profile --force-overwrite=true --trace=cuda,nvtx,cudnn,cublas --capture-range=cudaProfilerApi \
	  --capture-range-end=stop --output=$(OUT)/step $(PY) -m resfuse profile --capture $(PROFILE_ARGS)
	@nsys stats --force-export=true --report $(NSYS_REPORTS) $(OUT)/step.nsys-rep
	@nsys stats --report $(NSYS_REPORTS) --format csv --output $(OUT)/step $(OUT)/step.nsys-rep

gpu: build
	@PYTHONPATH=$(CURDIR) $(PY) benchmarks/gpu.py --out $(OUT) --parts $(PARTS)

lint: $(READY)
	@$(PY) -m ruff check .

wheel: $(READY)
	@$(PY) -m pip wheel -q --no-build-isolation --no-deps --no-index -w dist .
	@ls dist

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis resfuse/*.so resfuse/_build.json
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
