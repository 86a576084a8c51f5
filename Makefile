# Every verb does its own set-up: a virtual environment in .venv, nothing global.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check bench serve clean

# hnswlib is source only, and compiled for the processor it is compiled on: faster, and not to be moved to another
# (HNSWLIB_NO_NATIVE=1 makes one that can be). Where no compiler is at hand, that costs the kind hnsw, not the installation.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[cpu,models,dev]'
	$(BIN)/python -m pip install --quiet --editable '.[hnsw]' || echo "hnswlib did not build: kind hnsw is missing, the rest works"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python data/demo.py

# Where there is room, what the tests write lies in memory: they sync thousands of files.
IN_MEMORY := $(shell test -w /dev/shm && df -Pk /dev/shm | awk 'NR == 2 && $$4 > 4000000 { print "TMPDIR=/dev/shm" }')

# With one more worker than cores, for some of the time is waiting; then those tests that a busy machine would disturb.
test: $(STAMP)
	$(IN_MEMORY) $(BIN)/python -m pytest -n $$($(BIN)/python -c 'import os; print((os.cpu_count() or 1) + 1)') --dist worksteal -m "not alone"
	$(IN_MEMORY) $(BIN)/python -m pytest -m alone

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/run.py $(if $(DATA),--data $(DATA))

serve: $(STAMP)
	@test -d indexes || { $(BIN)/python data/docstrings.py && \
		$(BIN)/vecsvc build-index data/corpus.parquet --fields package,kind,signature,title; }
	$(BIN)/vecsvc serve indexes

clean:
	rm -rf $(VENV) indexes build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
