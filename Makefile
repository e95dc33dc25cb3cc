# Two commands: `make demo` and `make test`. Both set up .venv on a fresh machine and are quick when there is nothing to do.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
NATIVE := CMakeLists.txt pyproject.toml $(wildcard csrc/*)

.PHONY: demo test soak lint bench setup clean

setup: $(VENV)/.native

demo: setup
	$(BIN)/quire demo

# Two processes share two cores; one of torch's own threads that spins while it waits would take the other one's time.
test: setup
	GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -q -n 2 --dist worksteal

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
	touch $@

$(VENV)/.soak: $(VENV)/.deps
	$(PIP) install -c constraints.txt schemathesis
	touch $@

$(VENV)/.native: $(VENV)/.deps $(NATIVE)
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build
