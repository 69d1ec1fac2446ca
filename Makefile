# Everything runs in .venv, which is made on first use; the package is built again when its sources change.
#   make demo    train a CNN on real digits with cnnops and with plain PyTorch, and a short benchmark
#   make test    the tests               make test PYTEST="-k conv2d -x"
#   make lint    ruff, mypy, clang-format         make format   apply what ruff and clang-format want
#   make bench   every layer suite       make bench BENCH="vgg16 --batch 16"
#   make wheel   a wheel in dist/        make stub     cnnops/_C.pyi from the built extension
#   make gpu     on a machine with a CUDA device: build, test, sanitize and bench there, with the packages that PYTHON has;
#                make gpu GPU=test runs one part (build, test, sanitize, bench)
#   make clean   remove .venv and every build output
PYTHON ?= python3
VENV ?= .venv
PYTEST ?=
BENCH ?=
GPU ?= all
CUDA ?= AUTO

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt
PACKAGE := pyproject.toml CMakeLists.txt README.md LICENSE \
  $(shell find cmake csrc cnnops -type f ! -name '*.so' ! -name '*.pyc')
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DELETE_ON_ERROR:
.PHONY: demo test lint format bench wheel stub gpu clean

demo: $(VENV)/installed
	$(BIN)/python examples/train_mnist.py --out out
	$(BIN)/cnnops bench resnet50 --batch 1 --layout nchw --filter "C=64 H=56 W=56 K=64|^(max_pool2d|batch_norm) C=64 "
	@cat out/train_mnist.txt

# Two processes, whose threads yield while they wait: some tests keep one core busy (the emulator's), some two.
test: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist worksteal $(PYTEST)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(VENV)/lint
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/installed
	$(BIN)/cnnops bench $(BENCH)

wheel: $(VENV)/python
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

stub: $(VENV)/installed $(VENV)/lint
	$(BIN)/python tools/stub.py > $(VENV)/_C.pyi
	$(BIN)/ruff format $(VENV)/_C.pyi
	mv $(VENV)/_C.pyi cnnops/_C.pyi

gpu:
	$(PYTHON) tools/gpu.py $(GPU)

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'cnnops needs Python 3.10 or newer: make PYTHON=python3.x')"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/lint: $(VENV)/python requirements/lint.txt requirements/constraints.txt
	$(PIP) -r requirements/lint.txt
	@touch $@

# Without build isolation, so that build/ stays valid from one build to the next; with the CUDA kernels compiled for the
# host, for the tests.
$(VENV)/installed: $(VENV)/python requirements/build.txt requirements/constraints.txt $(PACKAGE)
	$(PIP) -r requirements/build.txt
	$(PIP) --no-build-isolation -C cmake.define.CNNOPS_EMULATION=ON -C cmake.define.CNNOPS_CUDA=$(CUDA) '.[test,bench,examples]'
	@touch $@
