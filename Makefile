# Requirements: Linux, Python >= 3.11, make. Everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
EXTRA ?= cpu

.PHONY: demo test test-slow test-all test-faults test-durations golden setup setup-benchmarks lint check bench \
	docs demo-models up down browser

# the second command puts the baselines beside the student
demo: setup
	$(BIN)/masters distill configs/demo.toml
	$(BIN)/masters study configs/studies/demo.toml

# two test files at a time, one per core
TEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup
	$(TEST) -m "not slow"

# one of four parts of about equal time
PART ?= 1/4
test-slow: setup setup-benchmarks browser
	$(TEST) -m slow --part $(PART) --fail-on-skip

test-all: setup setup-benchmarks browser
	$(TEST) --fail-on-skip

# prints the slowest tests and each suite's time, and stores the times by which `make test-slow` balances its parts
test-durations: setup setup-benchmarks browser
	$(TEST) --durations=30 --write-seconds

# records the golden loss curve again; only after a change of the method's definition, never to make a test pass
golden: setup
	$(BIN)/python -m tests.golden.regenerate

# kills and disturbs real pipelines, two at a time, at moments that SEED chooses; prints the outcomes
SEED ?= 0
test-faults: setup
	rm -f runs/faults/$(SEED).json
	SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --maxschedchunk 1 tests/faults/random_faults.py; ended=$$?; $(BIN)/python -m tests.faults.report $(SEED) && exit $$ended

# Chromium, for the tests that open the UIs; if you are not root, install it beforehand
browser:
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; }

# needs no network
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/deptry flows tasks models rewards infra benchmarks examples src demo
	$(BIN)/lint-imports --no-cache --no-logo

check: lint
	$(BIN)/pip-audit --no-deps --disable-pip --progress-spinner off -r requirements/$(EXTRA).txt

# writes docs/reference from the code, then the site in site/; a dead link is an error
docs: setup
	$(BIN)/python docs/gen_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

up: setup
	$(BIN)/masters up

down: setup
	$(BIN)/masters down

bench: setup
	$(BIN)/python -m benchmarks mask
	$(BIN)/python -m benchmarks head
	$(BIN)/python -m benchmarks step
	$(BIN)/python -m benchmarks engine
	$(BIN)/python -m benchmarks end-to-end
	$(BIN)/python -m benchmarks scale
	$(BIN)/python -m benchmarks large

# takes hours; on a machine that rounds differently the weights differ, and committed study results do not apply to them
demo-models: setup
	$(BIN)/python -m demo.digits teacher
	$(BIN)/python -m demo.digits teacher --more 500 --learning-rate 7.5e-4
	$(BIN)/python -m demo.digits teacher --more 600 --learning-rate 7.5e-4 --distortion 0.4 --seed 7
	$(BIN)/python -m demo.digits teacher --more 900 --learning-rate 4e-4 --distortion 0.4 --seed 11
	$(BIN)/python -m demo.digits teacher --more 400 --learning-rate 2e-4 --distortion 0.2 --seed 13 --mean
	$(BIN)/python -m demo.digits middle
	$(BIN)/python -m demo.digits student
	$(BIN)/python -m demo.train teacher --threads 2
	$(BIN)/python -m demo.train student --threads 1
	$(BIN)/python -m demo.judge
	$(BIN)/python -m demo.judge_captions
	$(BIN)/python -m demo.captions teacher
	$(BIN)/python -m demo.captions teacher --more 300 --learning-rate 1e-3 --in-order
	$(BIN)/python -m demo.captions student

setup: .venv/ready

# lmms-eval and its dependencies, in a folder that only its own process sees
setup-benchmarks: .venv/benchmarks/ready

.venv/benchmarks/ready: requirements/benchmarks.txt .venv/ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode --target .venv/benchmarks -r requirements/benchmarks.txt
	touch $@

# bytecode is compiled here: where Python may not write it beside the sources, every process would compile again (13 s)
.venv/ready: requirements/$(EXTRA).txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode -r requirements/$(EXTRA).txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@
