# One command each; every target makes .venv from the lock when it is missing or older than the lock.
PYTHON ?= python3.11
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
MEMORY_MB ?= 4000
GPUS ?= 1
BIN := .venv/bin
READY := .venv/.ready
SNAKEMAKE := $(BIN)/snakemake
LIMITS := --cores $(CORES) --resources mem_mb=$(MEMORY_MB) gpu=$(GPUS) # behind the targets: --resources takes all words that follow it

.PHONY: all setup tables figures smoke test test-slurm rehearsal lint dry bench reference bench-reference new-baseline kernels clean
.DEFAULT_GOAL := tables

setup: $(READY)

$(READY): requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "error: the lock is for Python 3.11; remove .venv and call make with PYTHON=…")'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	touch $@

tables: $(READY)  ## the main job: results/tables and results/figures
	$(SNAKEMAKE) results/tables results/figures $(LIMITS)

smoke: $(READY)  ## one clip of five frames: results/smoke
	$(SNAKEMAKE) --configfile config/smoke.yaml $(LIMITS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 -q

test-slurm: $(READY)  ## the workflow through a Slurm cluster of one node, started for this and ended after it
	sh scripts/test_slurm.sh $(BIN)/python

rehearsal: $(READY)  ## the paper's setting at full size on synthetic frames and random weights, downloads included
	CORES=$(CORES) $(BIN)/python scripts/rehearsal.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/mypy
	$(BIN)/snakemake --lint

dry: $(READY)
	$(SNAKEMAKE) --dry-run --quiet rules $(LIMITS)

reference: tables  ## results/reference and the README's table from this run
	$(BIN)/python scripts/update_readme.py

bench: $(READY)  ## measure again, on an otherwise idle machine: results/speed
	$(SNAKEMAKE) results/speed/tables --forcerun bench $(LIMITS)

bench-reference: bench  ## benchmarks/reference and the README's table of speed from this run
	$(BIN)/python scripts/update_readme.py --speed

kernels: $(READY)  ## the CUDA kernels for every architecture, with nvcc; no GPU is needed
	$(BIN)/python -m qvsr.kernels.build

new-baseline: $(READY)  ## NAME=mine: a method that runs as it is, its test and its configuration
	@$(BIN)/python scripts/new_baseline.py "$(if $(filter command,$(origin NAME)),$$NAME)" # only as an argument of make: shells have a NAME too

clean:  ## remove what the runs have written; weights and reference stay
	rm -rf .snakemake results/clips results/calibration results/quantized results/restored results/measured results/tables \
	  results/figures results/layers results/benchmarks results/logs results/speed results/smoke results/config.json
