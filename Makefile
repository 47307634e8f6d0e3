# The one place that knows how to set up, test and run the project. `make help` lists the targets.
VENV ?= .venv
PYTHON ?= python3
# The CPU build of torch; a GPU machine installs its own: make setup TORCH=torch
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
DATA ?= ../shared/data
BASE ?= HEAD
BIN := $(VENV)/bin
# Threads that wait asleep: spinning ones slow a busy machine down tenfold.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help system setup build demo test sanitize bench bench-compare results lint format docs new-op clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

system:  ## as root, on Debian or Ubuntu: compiler, Python headers, DIALS (tests and results compare with it)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	  build-essential cmake git python3-dev python3-venv dials

setup: $(VENV)/.installed  ## virtual environment with the package (editable) and everything its tests use

$(VENV)/.installed: pyproject.toml CMakeLists.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check "scikit-build-core>=0.11" "pybind11>=3.0" "ninja>=1.11"
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev,gpu]"
	touch $@

build: setup  ## rebuild the compiled extension after a change in csrc/
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .

demo: setup  ## simulate a data set, integrate it, compare with its truth: demo/report.html
	$(BIN)/xtalfast demo -o demo

test: setup  ## the whole test-suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

SANITIZED := build/sanitize
# what runs code of csrc/; a sanitized extension needs the runtime of the sanitizer before all else
SANITIZE_TESTS ?= $(addprefix tests/ops/test_, boxes.py density_map.py extract_shoeboxes.py intensity_posterior.py \
  patterson_map.py poisson_gamma_elbo.py profile_fit.py structure_factors.py) tests/io/test_cbf.py
# compiling and exporting run no other code of ours than the same ops called directly
SANITIZE_SKIP := compile or export or graph or instruction_set_that_does_not or dense_grid or coverage or beyond_two
LIBRARY = $(shell $(CXX) -print-file-name=$(1))

sanitize: setup  ## tests of the ops with csrc/ built to find bad addresses and undefined behaviour
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --no-deps --upgrade \
	  --target $(SANITIZED)/site -C build-dir=$(SANITIZED)/cmake -C cmake.define.XTALFAST_SANITIZE=ON \
	  -C cmake.define.XTALFAST_CUDA=OFF .
	LD_PRELOAD="$(call LIBRARY,libasan.so) $(call LIBRARY,libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	PYTHONPATH=$(SANITIZED)/site:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  $(BIN)/python -S -P -m pytest -q -n0 -p no:cacheprovider -s $(SANITIZE_TESTS) -m "not dials" \
	  -k "not ($(SANITIZE_SKIP))"

bench: setup  ## speed ratios against in-run baselines, compared with bench/baseline.json
	OMP_NUM_THREADS=1 $(BIN)/pytest bench --benchmark-sort=name --benchmark-columns=min,median,rounds $(PYTEST_ARGS)

bench-compare: setup  ## the same benches here and in BASE (a commit, branch or tag), in turns: what got slower?
	$(BIN)/python bench/compare.py $(BASE) $(PYTEST_ARGS)

results: setup  ## docs/results.md from the shared data (DATA=...), DIALS beside us; ONLY="NAME ..." for some sections
	$(BIN)/python bench/results.py --data $(DATA) $(if $(ONLY),--only $(ONLY))

lint: setup  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

format: setup  ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

docs: setup  ## rewrite docs/cli.md from the program's own help
	$(BIN)/python docs/generate.py

new-op: setup  ## the files of a new op: make new-op NAME=my_op
	$(BIN)/python tools/new_op.py $(NAME)

clean:  ## remove build products, never results
	rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache
