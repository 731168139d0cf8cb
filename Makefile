# Every target sets up what it needs, on a machine with Python >= 3.10 and a C++17 compiler:
#   make demo | test | test-versions | bench | lint | sanitize | clean
# PYTHON chooses the interpreter, PIP_EXTRA adds options to pip, TEST_JOBS is the number of test
# processes, PYTEST_ARGS and DEMO_ARGS and BENCH_ARGS go to what they name.

PYTHON ?= python3
PIP_EXTRA ?=
PYTEST_ARGS ?=
TEST_JOBS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# The pin of torch stands here as well: a constraint alone would not ask for it by its version.
INSTALL := $(PY) -m pip install --disable-pip-version-check $(PIP_EXTRA) -c constraints.txt
TORCH := torch==2.13.0

SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
CXX_FILES := $(filter-out setup.py,$(SOURCES)) $(wildcard tests/sanitize/*.cpp tests/sanitize/*.h \
	tests/emulation/*.cpp tests/emulation/*.h benchmarks/*.cu)

.PHONY: demo test test-versions bench lint sanitize build clean
.DELETE_ON_ERROR:

demo: build $(VENV)/stamp-demo
	$(PY) examples/char_lm.py $(DEMO_ARGS)

test: $(VENV)/stamp-cuda $(VENV)/stamp-dev
	$(PY) -m pytest -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

# With other versions of torch; VERSIONS="2.9.1 2.14.1" names some.
test-versions: build
	PYTHON=$(PY) PIP_EXTRA="$(PIP_EXTRA)" PYTEST_ARGS="-n $(TEST_JOBS) $(PYTEST_ARGS)" \
		tests/versions.sh $(VERSIONS)

bench: build $(VENV)/stamp-bench
	$(PY) -m pytest benchmarks $(PYTEST_ARGS)
	$(PY) -m benchmarks.run --opponents $(BENCH_ARGS)
	$(PY) -m benchmarks.plot

lint: $(VENV)/stamp-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

# The kernels in a C++ program of their own, watched by the compiler's sanitizers.
sanitize: $(VENV)/stamp-tools
	PYTHON=$(PY) tests/sanitize/run.sh

build: $(VENV)/stamp-build

clean:
	rm -rf $(VENV) build dist fastrnn/*.so *.egg-info

$(VENV)/stamp-tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "fastrnn needs Python >= 3.10; name one with: make PYTHON=python3.x"; exit 1; }
	@echo "== virtual environment and build tools"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools pybind11 ninja
	@touch $@

# The build comes before the installation, which hides what it does and then finds it done.
$(VENV)/stamp-build: $(VENV)/stamp-tools $(SOURCES)
	@echo "== building fastrnn"
	$(PY) setup.py build_ext --inplace
	@touch $@

# The tests of the CUDA kernels need no GPU and no torch with CUDA, but nvcc; else they skip.
$(VENV)/stamp-cuda: $(VENV)/stamp-build
	@echo "== building fastrnn._cuda where nvcc is found"
	@if command -v "$${NVCC:-nvcc}" > /dev/null; then \
		FASTRNN_CUDA="$${FASTRNN_CUDA:-1}" $(PY) setup.py build_ext --inplace; fi
	@touch $@

$(VENV)/stamp-%: $(VENV)/stamp-tools pyproject.toml | $(VENV)/stamp-build
	@echo "== dependencies: $*"
	$(INSTALL) $(TORCH) --no-build-isolation -e '.[$*]'
	@touch $@
