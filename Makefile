# make demo and make test install what they need into .venv. They need Python, make and a C compiler.
#   make test ARGS="-k radius"        arguments for pytest (JOBS=0: one process)
#   make demo TORCH=2.11.0            another torch: a version, a requirement, or the path of a wheel
#   make setup PYTHON=python3.12      another Python (3.11 to 3.13)

VENV ?= .venv
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
TORCHATTACKS := $(shell sed -n '/^torchattacks==/p' constraints.txt)
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
# The installation is valid for one version of torch and one path of the checkout (an editable install contains that path).
KEY := $(shell printf '%s' '$(CURDIR) $(TORCH)' | cksum | cut -d' ' -f1)
READY := $(VENV)/.ready-$(KEY)
LINT_READY := $(READY)-lint
# Written during the installation: constraints.txt with the installed version of torch.
PINS := $(VENV)/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all setup lint clean certificates

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' Makefile

demo: $(READY)  ## certify and attack six models; table and report
	$(BIN)/robustlip demo $(ARGS)

# One thread per worker: two workers with a thread pool each are slower.
test: $(READY)  ## all tests except those marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m 'not slow' $(ARGS)

test-all: $(READY)  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

setup: $(READY)  ## create the virtual environment

lint: $(LINT_READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## remove the virtual environment, builds and caches
	rm -rf '$(VENV)' build dist ./*.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache .demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is installed first and alone, so that TORCH decides its version; torchattacks last and without its dependencies (see pyproject.toml).
# pip uses its own configuration (indexes, mirrors, certificates).
$(READY): pyproject.toml constraints.txt
	@set -eu; \
	python=''; \
	for candidate in $(if $(PYTHON),'$(PYTHON)',python3.11 python3 python3.12 python3.13 python); do \
	  if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then \
	    python="$$candidate"; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "expected Python 3.11 to 3.13, got $$('$(or $(PYTHON),python3)' --version 2>&1 | head -n 1); install one or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.11" >&2; \
	  exit 2; \
	fi; \
	if ! '$(BIN)/python' -c 'import sys, pip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then \
	  rm -rf '$(VENV)'; \
	  "$$python" -m venv '$(VENV)' || { echo "expected a Python with the venv module, got $$python without it; install it (python3-venv on Debian) or name another: PYTHON=..." >&2; exit 2; }; \
	fi
	@rm -f $(VENV)/.ready-*
	grep -v '^torch==' constraints.txt > $(PINS)
	case '$(TORCH)' in [0-9]*) torch='torch==$(TORCH)';; *) torch='$(TORCH)';; esac; \
	  $(BIN)/python -m pip install --quiet -c $(PINS) 'setuptools>=77' wheel "$$torch"
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(PINS)
	$(BIN)/python -m pip install --quiet -c $(PINS) --no-build-isolation -e '.[test,audit,onnx,hf]'
	$(BIN)/python -m pip install --quiet -c $(PINS) --no-deps '$(TORCHATTACKS)'
	@touch $@

$(LINT_READY): $(READY)
	$(BIN)/python -m pip install --quiet -c $(PINS) --no-build-isolation -e '.[lint]'
	@touch $@

# After any change of a certified radius: increase RULES_VERSION in robustlip/certifiers/__init__.py and make the zoo's certificates again.
certificates: $(READY)  ## make the zoo's certificates again, after a change of radii
	@set -eu; certify() { $(BIN)/robustlip certify "$$1" --data "$$2" --threat "$$3" --limit "$$4" --method "$$5" --json "models/zoo/certificates/$$1.$$3.json"; }; \
	for role in lipschitz baseline; do \
	  certify digits-mlp-$$role digits:test l2 100 local-lipschitz; \
	  certify digits-mlp-$$role digits:test linf 100 local-lipschitz; \
	  certify digits-transformer-$$role digits:test embedding-l2 100 dual; \
	done; \
	certify shakespeare-gpt-lipschitz page:test embedding-l2 6 dual; \
	certify shakespeare-gpt-lipschitz-wide page:test embedding-l2@-1 8 dual; \
	certify shakespeare-gpt-baseline page:test embedding-l2 5 dual; \
	certify shakespeare-gpt-per-head page:test embedding-l2 8 dual; \
	certify shakespeare-gpt-published-2 page:test embedding-l2@-1 12 dual; \
	certify shakespeare-gpt-robust page:test embedding-l2@-1 12 dual; \
	certify shakespeare-gpt-robust-long page:test embedding-l2@-1 12 dual; \
	certify shakespeare-gpt-robust-wide page:test embedding-l2@-1 12 dual; \
	certify shakespeare-gpt-robust-wider page:test embedding-l2@-1 12 dual; \
	certify shakespeare-gpt-sound page:test embedding-l2 4 dual; \
	if [ -n "$$ROBUSTLIP_DATA" ]; then \
	  for role in lipschitz baseline; do \
	    certify cifar10-mlp-$$role cifar10:test l2 100 local; certify cifar10-mlp-$$role cifar10:test linf 100 local; \
	  done; \
	  certify mnist-mlp-lipschitz mnist:test l2 100 global; certify mnist-mlp-baseline mnist:test l2 100 local-lipschitz; \
	fi
