# Everything here makes what it needs by itself: a virtual environment in .venv, the native core, the dependencies.
# Needed before: Python 3.11 or newer, pip, a C compiler, make. All paths are relative, so the checkout may lie anywhere.
#
#   make demo ARGS="--seconds 30 --json out.json"        make test ARGS="tests/unit -x"        make PYTHON=python3.13 test

PYTHON ?= python3
ARGS ?=

IN := .venv/bin/python
READY := .venv/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test slow lint types guard bench clean

help:
	@echo "make demo    three PostgreSQL servers, a workload, a shard added while it runs; ARGS as 'shardkit demo'"
	@echo "make test    the tests; ARGS as pytest"
	@echo "make slow    the tests that take minutes"
	@echo "make lint    ruff"
	@echo "make types   mypy --strict, and the stub of the native core against what it is"
	@echo "make guard   whether the hot paths cost more than they did"
	@echo "make bench   benchmarks side by side; JSON into benchmarks/results/"
	@echo "make clean   remove what was built, and .venv"

demo: $(READY)
	.venv/bin/shardkit demo $(ARGS)

# Three processes, each with servers of its own: most of the time a test waits for one. Benchmarks want no company.
test: $(READY)
	$(IN) -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -p no:benchmark $(ARGS)

slow: $(READY)
	$(IN) -m pytest -m slow $(ARGS)

lint: $(READY)
	$(IN) -m ruff check .

types: $(READY)
	$(IN) -m mypy
	$(IN) -m mypy.stubtest shardkit._ring

guard: $(READY)
	$(IN) -m benchmarks.guard $(ARGS)

bench: $(READY)
	.venv/bin/python -m pip install --quiet -r benchmarks/peers.txt
	-.venv/bin/python -m pip install --quiet ketama  # in C, and not to be had everywhere
	$(IN) -m benchmarks.run $(ARGS)
	$(IN) -m benchmarks.balance
	$(IN) -m benchmarks.move
	$(IN) -m benchmarks.pause
	$(IN) -m benchmarks.growth

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks benchmarks/results
	rm -rf _ring.c shardkit.egg-info shardkit/_ring.*.so
	find shardkit migrations tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp lies inside .venv, so that whoever removes .venv removes it too. What is needed to build comes first and
# stays: the build then runs without isolation, the same for every rebuild, and a test packages offline.
PIP := $(IN) -m pip --disable-pip-version-check install

$(READY): pyproject.toml setup.py _ring.pyx | $(IN)
	@echo "Building and installing shardkit into .venv ..."
	@$(IN) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" \
		> .venv/build-requirements.txt
	@{ $(PIP) -r .venv/build-requirements.txt && \
		$(PIP) --no-build-isolation --editable '.[demo,test,dev]' && \
		SHARDKIT_RING=cython $(IN) -c "import shardkit.core.ring"; \
	} >.venv/install.log 2>&1 || { tail -n 60 .venv/install.log >&2; exit 1; }
	@touch $@

# Some systems (Debian without python3-venv) cannot make a virtual environment with pip in it: virtualenv can.
$(IN):
	@command -v "$(PYTHON)" >/dev/null || { echo "shardkit needs Python 3.11 or newer: there is no" \
		"'$(PYTHON)' here; name one, as in: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "shardkit needs Python 3.11 or newer:" \
		"'$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); name another, as in: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Making a virtual environment in .venv ..."
	@rm -rf .venv .virtualenv
	@"$(PYTHON)" -m venv .venv >.venv.log 2>&1 && $(IN) -m pip --version >/dev/null 2>&1 || { rm -rf .venv && \
		"$(PYTHON)" -m pip install --quiet --target .virtualenv virtualenv >>.venv.log 2>&1 && \
		PYTHONPATH=.virtualenv "$(PYTHON)" -m virtualenv --quiet .venv >>.venv.log 2>&1; } || { \
		cat .venv.log >&2; rm -rf .venv .virtualenv .venv.log; exit 1; }
	@rm -rf .virtualenv .venv.log
