# Two commands need no set-up: `make demo` and `make test`. The environment is .venv.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)

.PHONY: demo test test-slow test-wheel lint bench format clean

demo: .venv/built
	$(BIN)/drift-fast demo --out demo-output

test: .venv/built
	cargo test --release --workspace --quiet
	$(BIN)/python -m pytest -q -m "not slow"
	$(MAKE) --no-print-directory test-wheel

test-slow: .venv/built
	$(BIN)/python -m pytest -q -m slow

# The wheel as a user gets it: an environment of its own with its declared dependencies only.
test-wheel: .venv/built
	rm -rf build/wheel build/clean
	. $(BIN)/activate && maturin build --release --quiet --out build/wheel
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet build/wheel/*.whl
	cd build/clean && bin/python -I ../../tests/use_wheel.py

lint: .venv/built
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest drift_fast._core

bench: .venv/built
	$(BIN)/python benches/delta.py

format: .venv/built
	cargo fmt --all
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist target demo-output

.venv/built: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
