# Two commands do all of their own set-up on a machine with Python 3.11+ and make: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test proof lint format bench clean

# The demo needs a part of what the tests do: theirs is used where it is there, and not installed for the demo.
demo: $(if $(wildcard .venv/installed),.venv/installed,.venv/demo)
	$(BIN)/peel-agent demo $(DEMO)

# Module by module in several processes, each with one thread: more of them than processors only get in each other's way.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not bench and not long" tests

# The long proofs: every line at which the agent can be stopped, more trainings and schedules, the demo in full size,
# the gallery in short, an alert whose block is released in the middle of the run, the batch scripts under a real SLURM
# (Debian's slurmctld, slurmd, slurm-client and munge; as root), a Ray
# cluster of two nodes.
proof: .venv/proof
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile -m long tests

lint: .venv/installed
	$(BIN)/ruff check peel_agent plugins tests
	$(BIN)/ruff format --check peel_agent plugins tests
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix peel_agent plugins tests
	$(BIN)/ruff format peel_agent plugins tests

bench: .venv/installed
	$(BIN)/python -m tests.bench

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "peel-agent needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,test]"
	touch $@

.venv/proof: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[ray]"
	touch $@

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "peel-agent needs Python 3.11 or newer")'
	@echo "make demo, 1 of 3: an environment of its own in .venv"
	$(PYTHON) -m venv .venv
	@echo "make demo, 2 of 3: peel-agent, torch, transformers and MLflow into it; once, some minutes; each package is named"
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e ".[demo]"
	@echo "make demo, 3 of 3: the demo itself"
	touch $@

clean:
	rm -rf .venv build *.egg-info
