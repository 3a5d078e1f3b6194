# make demo    train, evaluate, register and ask a small model (sets up .venv first)
# make test    every check and every test; those on hosts of network namespaces only as root, with sshd, rsync,
#              iproute2 and nftables
# make check   format, lint, types, import directions, unit tests: some three minutes
# make setup   .venv alone; made anew when pyproject.toml changes
# make format  rewrite the code in the house style
# make clean   remove caches and build products; .venv stays
#
# PYTHON=/path/to/python3.11 chooses the interpreter for .venv.

CANDIDATES := $(or $(PYTHON),python3.11 python3 python3.12 python3.13)
BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off

.PHONY: demo test check setup format clean
.DEFAULT_GOAL := check

demo: $(READY)
	$(BIN)/python jobs/demo.py

test: check
	$(PYTEST) -m "slow and not ray"
	$(BIN)/pytest -m ray  # one after the other: clusters, and kills in them, need the machine

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(PYTEST) -m "not ray and not slow"

setup: $(READY)

format: $(READY)
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis platform/*.egg-info
	find platform tests jobs benchmarks -name __pycache__ -prune -exec rm -rf {} +

# torch comes first: packages that build against it find it there.
$(READY): pyproject.toml
	@set -e; \
	for candidate in $(CANDIDATES); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        python="$$candidate"; break; \
	    fi; \
	done; \
	if [ -z "$${python:-}" ]; then \
	    echo "error: none of these is Python 3.11 or newer: $(CANDIDATES)" >&2; \
	    echo "  -> install it (apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	fi; \
	if ! "$$python" -c 'import venv, ensurepip' 2>/dev/null; then \
	    echo "error: $$python cannot make environments" >&2; \
	    echo "  -> apt install python3-venv" >&2; \
	    exit 1; \
	fi; \
	[ -x $(BIN)/python ] || { echo "making .venv with $$python"; "$$python" -m venv .venv; }
	$(PIP) "torch>=2.13,<2.14"
	$(PIP) --editable ".[dev]"
	@touch $@
