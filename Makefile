# make demo | make test-fast | make test | make check | make docs | make matrix | make bench | make gpu-check
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE := 1

.PHONY: env demo test test-fast check docs hooks matrix matrix-newest format bench gpu-check baseline freeze clean

env: $(STAMP)

# torch comes first and pinned: installed as somebody's dependency it would bring several gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[torch,onnx,rtx,serve,openai,guided,sign,genai,openvino,docs,dev]'
	touch $@

demo: env
	$(BIN)/python scripts/demo.py

# What is not slow first, a process a core; then real servers, processes that are stopped and deadlines, one after another.
test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n auto --dist worksteal
	$(BIN)/python -m pytest -q -m slow

# The inner loop: everything but the tests marked `slow` (tests/conftest.py says which those are), a process a core and a thread each.
test-fast: export OMP_NUM_THREADS = 1
test-fast: env
	$(BIN)/python -m pytest -q -m "not slow" -n auto --dist worksteal

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, in build/docs: guides, and the reference from the docstrings. A warning is an error.
docs: env
	$(BIN)/sphinx-build -q -W --keep-going -c docs -d build/docs-doctrees . build/docs
	@echo build/docs/index.html

# Runs `make check`'s tools before each commit.
hooks: env
	$(BIN)/pre-commit install

# The model's tests and a build against the lowest and the newest transformers and ONNX Runtime that pyproject.toml allows.
matrix:
	$(PYTHON) scripts/matrix.py

matrix-newest:
	$(PYTHON) scripts/matrix.py newest

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: env
	$(BIN)/python scripts/bench.py

# With the machine's own Python: a CUDA build of PyTorch is there already, and the environment above has the CPU one.
gpu-check:
	$(PYTHON) scripts/gpu_check.py

# Records what the example's engines are like (examples/ci): after a change that is meant to move them.
baseline: env
	for target in cpu-fp32 cpu-int8 cpu-int4 onnx-portable; do \
	  rm -rf build/baseline && \
	  $(BIN)/ngpt-deploy build --checkpoint examples/ngpt-tiny --target $$target --output build/baseline --no-verify && \
	  $(BIN)/ngpt-deploy verify build/baseline --checkpoint examples/ngpt-tiny --baseline examples/ci/ngpt-tiny.baseline.json --update-baseline || exit 1; \
	done

freeze: env
	@echo "# Versions seen to resolve and to pass the whole suite together (Python 3.11, 2 CPU cores). Regenerate with: make freeze" > constraints.txt
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' >> constraints.txt

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
