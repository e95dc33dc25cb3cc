# Two commands: `make demo` and `make test`. Both set up .venv on a fresh machine and are quick when there is nothing to do.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# For its tests alone, and beside the environment: where it is in it, transformers imports it, a tenth of a second at each start.
TRITON := $(VENV)/triton
PIP := $(BIN)/pip --disable-pip-version-check -q
NATIVE := CMakeLists.txt pyproject.toml $(wildcard csrc/*)

.PHONY: demo test test-tiles soak lint bench setup clean

setup: $(VENV)/.native

demo: setup
	$(BIN)/quire demo

# Two processes share two cores; one of torch's own threads that spins while it waits would take the other one's time. And many tests start Python: each
# of these would compile all of Quire's modules where the environment forbids to keep them compiled, more than a second.
test: setup
	GOMP_SPINCOUNT=0 PYTHONDONTWRITEBYTECODE= PYTHONPATH=$(CURDIR)/$(TRITON) $(BIN)/python -m pytest -q -n 2 --dist worksteal

# AMX's kernels on a CPU without tiles, which are computed in vectors: it needs AVX512-BF16, some minutes, and is not part of `make test`.
TILES := build/tiles
test-tiles: setup
	PATH=$(CURDIR)/$(BIN):$$PATH cmake -S . -B $(TILES) -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DQUIRE_ISAS=amx -DQUIRE_EMULATED_TILES=ON
	$(BIN)/ninja -C $(TILES)
	QUIRE_NATIVE=$$(ls $(CURDIR)/$(TILES)/_native*) $(BIN)/python -m pytest -q -n 2 tests/tensors/test_native_linear.py tests/tensors/test_native_attention.py tests/tensors/test_native_attention_bits.py tests/tensors/test_native_attention_shared.py tests/tensors/test_native_codec.py tests/tensors/test_packed.py tests/tensors/test_packed_short.py

soak: setup $(VENV)/.soak
	$(BIN)/python -m pytest -q -rP tests/policy tests/tensors/test_disk_random.py tests/engine/test_random.py tests/server/test_soak.py tests/server/test_schemathesis.py --hypothesis-profile=soak

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/quire bench

# torch comes first and pinned: left to itself, pip takes a build with several GB of CUDA.
$(VENV)/.deps: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt scikit-build-core nanobind cmake ninja
	$(PIP) install -c constraints.txt transformers llguidance typer rich fastapi uvicorn prometheus_client jinja2
	$(PIP) install -c constraints.txt pytest pytest-xdist hypothesis ruff mypy psutil openai httpx playwright
	$(PIP) install -c constraints.txt --no-deps --target $(TRITON) 'triton; sys_platform == "linux"'
	touch $@

$(VENV)/.soak: $(VENV)/.deps
	$(PIP) install -c constraints.txt schemathesis
	touch $@

$(VENV)/.native: $(VENV)/.deps $(NATIVE)
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build
