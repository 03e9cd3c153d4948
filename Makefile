# make run: the quickstart.  make test: all tests.  Both set themselves up.  make help lists the rest.
# The first Python here that starts and is new enough; another one by make setup PYTHON=python3.13.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null && echo $$p && exit; done; echo python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SEED ?= 0
RUN ?= runs/quickstart
PORT ?= 8000
JOBS ?= 1
SCALE ?= 1

.PHONY: help setup setup-browser setup-llama setup-harness hooks run run-real lint test test-full docs docs-serve \
  export house notebooks dist clean fuzz faults bench-ks bench-bank bench-step bench-prefix engines audit-worlds \
  stability verdict real stops

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: .venv/ready ## make .venv with pinned dependencies and the library in editable mode

.venv/ready: constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null || { \
	  echo "$(PYTHON) is not here, or too old: install Python 3.11, 3.12 or 3.13, or name one with make PYTHON=..."; \
	  exit 1; }
	@echo "Setting up .venv (once; a minute or three) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) setuptools wheel
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

setup-browser: ## Debian's chromium and its driver, for the tests of the site (apt-get; asks sudo unless you are root)
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null \
	  && command -v chromedriver >/dev/null || { \
	  command -v apt-get >/dev/null || { \
	    echo "no apt-get here: install Chromium and its driver yourself; chromium and chromedriver belong on the PATH"; \
	    exit 1; }; \
	  as=$$(test $$(id -u) = 0 || echo sudo); $$as apt-get update -qq \
	    && $$as apt-get install -y -qq --no-install-recommends chromium chromium-driver; }

# Everything that tickets do not need is left out. There is no wheel: it takes six minutes of processor time.
LLAMA = -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF \
  $(foreach part,TESTS EXAMPLES TOOLS SERVER,-DLLAMA_BUILD_$(part)=OFF)

setup-llama: .venv/ready ## llama.cpp and its Python package, built here, for the slow tests and make engines
	@CMAKE_ARGS="$(LLAMA)" $(PIP) llama-cpp-python gguf

setup-harness: .venv/ready ## lm-evaluation-harness, for the page on it
	@$(PIP) --no-build-isolation -e '.[harness]'

hooks: .venv/ready ## git checks what you commit: notebooks clean, library in sync, ruff
	@$(BIN)/pre-commit install

run: .venv/ready ## the quickstart on the built-in model: runs/quickstart/ (SEED=7 takes another seed)
	@$(BIN)/kslottery run quickstart -p seed=$(SEED) -p out=$(RUN)

# Real text and a real model, unless DATA= and MODEL= name them, are where benchmarks/shared.py finds them: a model is
# taken from there for the sentences that it was made from, else one is made in MINUTES. (MODEL= and nothing makes one.)
SHARED_DATA = $(or $(KSLOTTERY_DATA),../shared/data)
SHARED_MODELS = $(or $(KSLOTTERY_MODELS),../shared/models)
MINUTES ?= 25
LANGUAGES ?= $(if $(wildcard $(DATA)/train.tsv.gz),en-de,en-ca)
# Seven rows are asked for: nothing is planted in such a model, and in short sentences no row passes alpha = .05.
SHORT = -p train=$(abspath $(DATA))/train.tsv.gz -p test=$(abspath $(DATA))/test.tsv.gz \
  -p calibration=$(abspath $(DATA))/calibration.tsv.gz -p train_limit=600 -p lr_embed=2e-3 -p top_k=7
NEWS = -p train=$(abspath $(DATA))/train/en-ca.tsv.gz -p train_limit=600 -p test_limit=100 \
  -p test=$(abspath $(DATA))/ntrex/eng.txt,$(abspath $(DATA))/ntrex/cat.txt

run-real: DATA ?= $(SHARED_DATA)/short
run-real: MODEL ?= \
  $(if $(filter $(realpath $(SHARED_DATA)/short),$(realpath $(DATA))),$(wildcard $(SHARED_MODELS)/en-de-short))
run-real: .venv/ready ## the same on real text, and a model made of it: DATA=<folder> MINUTES=25 (or MODEL=<checkpoint>)
	@test -d "$(DATA)" || { echo "make run-real needs DATA=<folder>: $(DATA) is none. It holds pretrain-en-de.tsv.gz and" \
	  "train, test, calibration.tsv.gz, or train/en-ca.tsv.gz and ntrex/*.txt"; exit 2; }
	@test -n "$(MODEL)" || $(BIN)/kslottery run pretrain -p data=$(abspath $(DATA)) -p languages=$(LANGUAGES) \
	  -p minutes=$(MINUTES) -p seed=$(SEED) -p out=runs/pretrain $(PRETRAIN)
	@$(BIN)/kslottery run quickstart -p model=$(or $(MODEL),runs/pretrain/model) -p languages=$(LANGUAGES) \
	  -p template=explicit $(if $(wildcard $(DATA)/train.tsv.gz),$(SHORT),$(NEWS)) -p seed=$(SEED) -p out=runs/real $(REAL)

lint: .venv/ready ## ruff and mypy
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check . && $(BIN)/mypy --no-error-summary

test: lint ## notebooks clean and in sync, every notebook at its fast size, pytest, ruff, mypy
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 \
	  -m "not slow and not gpu" $(PYTEST)

test-full: .venv/ready ## make test and what is slow: full sizes, several seeds, five minutes of fuzz
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 $(PYTEST)

# What the page "Security and faults" shows: make fuzz CASES=100000 JOBS=2 OUT=benchmarks/results/faults.json (ten
# minutes on two cores), then make faults with the same OUT (fifteen); each leaves what the other wrote.
fuzz: .venv/ready ## odd input of six kinds: CASES=100000, or LIMIT=5 (minutes); SEED=0 JOBS=1 OUT= FUZZ="--kind tables"
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(if $(CASES),--cases $(CASES)) $(if $(LIMIT),--minutes $(LIMIT)) \
	  --seed $(SEED) --jobs $(JOBS) $(if $(OUT),--out $(OUT)) $(FUZZ)

faults: .venv/ready ## kills, signals, races, full disks, permissions, a soak: SCALE=1 SEED=0 OUT= FAULTS="--only kills"
	@OMP_NUM_THREADS=1 $(BIN)/python tests/faults.py --scale $(SCALE) --seed $(SEED) $(if $(OUT),--out $(OUT)) $(FAULTS)

docs: .venv/ready ## the site, into _docs/ (by Quarto where it is installed, else by mkdocs-material)
	@$(BIN)/python nbs/_render.py

docs-serve: docs ## the site at http://localhost:8000 (PORT=8001 takes another)
	@echo "http://localhost:$(PORT)"; $(BIN)/python -m http.server --directory _docs --bind 127.0.0.1 $(PORT)

export: .venv/ready ## notebooks -> kslottery/, README.md and the picture of the house
	@$(BIN)/nbdev_clean && $(BIN)/nbdev_export && for step in readme house; do $(BIN)/python tests/$$step.py || exit; done

house: .venv/ready ## the picture in CONTRIBUTING.md: the modules and what they import
	@$(BIN)/python tests/house.py

notebooks: .venv/ready ## execute the notebooks at full size and store their outputs
	@$(BIN)/python tests/execute.py $(NB)

dist: .venv/ready ## wheel and sdist, into dist/
	@rm -rf dist && $(BIN)/python -m build --no-isolation --outdir dist .

clean: ## remove what can be built again (the environment, builds; not runs/)
	rm -rf .venv _proc _docs _build build dist *.egg-info .pytest_cache .ruff_cache

bench-ks: .venv/ready ## the KS scan against a scipy loop: ratios, memory, growth
	@$(BIN)/python benchmarks/bench_ks.py --out benchmarks/results/ks.json

bench-bank: .venv/ready ## many tickets in one batch against merged models and switched LoRA adapters
	@$(BIN)/python benchmarks/bench_bank.py --out benchmarks/results/bank.json

bench-step: .venv/ready ## one step of row tuning against PEFT, LoRA, dense and full tuning: ratios of time and memory
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_step.py --out benchmarks/results/step.json

bench-prefix: .venv/ready ## a step with the template's prefix run once per batch, against one without: ratio of time
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_prefix.py --out benchmarks/results/prefix.json

engines: .venv/ready ## tickets as adapters of llama.cpp against transformers (make setup-llama first; half a minute)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engines.py --out benchmarks/results/engines.json

audit-worlds: .venv/ready ## the audit in two worlds with a known answer, three seeds, two settings (about ten minutes)
	@$(BIN)/python benchmarks/audit_worlds.py --out benchmarks/results/audit_worlds.json

stability: .venv/ready ## which rows of a ticket come back, over three seeds (about five minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/stability.py --out benchmarks/results/stability.json

verdict: .venv/ready ## how often the verdict is wrong, 2,000 samples a cell (DATA=<folder with ntrex/>: with BLEU, too)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/verdict.py $(if $(DATA),--corpus $(DATA)/ntrex) \
	  --out benchmarks/results/verdict.json

real: .venv/ready ## the page "Real language": scan, arms, audit, certificate (MODEL=, DATA=<.../short>; 45 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/real.py $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) \
	  --out benchmarks/results/real.json

stops: .venv/ready ## which rows stop a model, and the certificate (MODEL=, DATA=<.../short>; about twelve minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/stops.py $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) \
	  --out benchmarks/results/stops.json
