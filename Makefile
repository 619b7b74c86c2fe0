# make demo | make test | make check | make matrix | make bench | make gpu-check
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE := 1

.PHONY: env demo test check matrix matrix-newest format bench gpu-check freeze clean

env: $(STAMP)

# torch comes first and pinned: installed as somebody's dependency it would bring several gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[torch,onnx,rtx,serve,genai,openvino,dev]'
	touch $@

demo: env
	$(BIN)/python scripts/demo.py

test: env
	$(BIN)/python -m pytest -q

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

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

freeze: env
	@echo "# Versions seen to resolve and to pass the whole suite together (Python 3.11, 2 CPU cores). Regenerate with: make freeze" > constraints.txt
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' >> constraints.txt

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
