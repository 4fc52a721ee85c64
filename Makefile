# make demo       the whole pipeline, at most 12 minutes on two CPU cores
#                 make demo [SOURCE=c4|my_text.jsonl.zst] [TASK=RTE GLUE_DIR=glue_data] [MINUTES=10] [FAMILIES="bert nano"]
# make test       the test suite;  make test-slow  the longer proofs;  make lint  ruff
# make plots      every figure of runs/ and results/
# make bench      kernels, training step and data preparation against other libraries

SOURCE ?= docstrings
FAMILIES ?= bert mosaic nano
# of pretraining, for each family
MINUTES ?= 1.5
VOCAB ?= 4096
# the labelled task: made from held-out text of the corpus, or a GLUE task from local files
TASK ?= word-order
GLUE_DIR ?=
# names that keep demos with other settings apart
NAME := demo-$(basename $(basename $(notdir $(SOURCE:/=))))-$(VOCAB)-$(TASK)
DATA := data/$(NAME)
RUN := $(NAME)-$(MINUTES)min
RUNS := $(FAMILIES:%=runs/$(RUN)-%)
# short windows: in minutes a small BERT learns word order from 32 tokens, but not from 128 (docs/LOG.md)
TRAIN_FLAGS = --data $(DATA) --seq_len 32 --max_minutes $(MINUTES) --checkpoint_every 0.34
# all of C4 takes hours: a demo takes its beginning
LIMIT = $(if $(filter c4,$(SOURCE)),--max_docs 20000)
ifeq ($(TASK),word-order)
EXAMPLES = 4000
TASK_FLAGS = --task $(DATA)/task/train.tsv --eval $(DATA)/task/dev.tsv --task_name word-order
else
EXAMPLES = 0
TASK_FLAGS = --task $(TASK) $(if $(GLUE_DIR),--glue_dir $(GLUE_DIR))
endif
# the run with the lowest held-out loss, from the last "eval" line of each log
LAST_LOSS = lambda run: [r["loss"] for r in map(json.loads, open(run + "/log.jsonl")) if r["type"] == "eval"][-1]
BEST = $$($(PY) -c 'import json, sys; print(min(sys.argv[1:], key=$(LAST_LOSS)))' $(RUNS))

# PyTorch's CPU threads wait without spinning: 15 to 20 % slower on an idle machine, some ten times
# faster on a busy one (docs/LOG.md)
export OMP_WAIT_POLICY ?= PASSIVE

PYTHON ?= python3
PY = .venv/bin/python
# No GPU: prefer PyTorch's CPU wheels (0.2 GB) to the CUDA ones (several GB) if their index answers.
CPU_INDEX = https://download.pytorch.org/whl/cpu
PIP = $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow lint plots bench clean

# what running needs, and what only tests, lint and comparisons need
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
		echo "no NVIDIA GPU: looking for the CPU build of torch"; \
		$(PIP) --retries 0 --timeout 10 --index-url $(CPU_INDEX) "$$(grep '^torch' requirements.txt)" \
			>/dev/null 2>&1 || echo "its index does not answer; taking torch from the default index"; \
	fi
	$(PIP) -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

demo: .venv/installed
	@echo "[1/6] corpus, tokenizer and a labelled task from $(SOURCE) -> $(DATA)"
	@$(PY) prepare_c4.py $(SOURCE) --out $(DATA) --vocab_size $(VOCAB) --val_fraction 0.02 --task_examples $(EXAMPLES) $(LIMIT)
	@echo "[2/6] pretraining $(FAMILIES) for $(MINUTES) minutes each -> $(RUNS)"
	@set -e; for family in $(FAMILIES); do \
		$(PY) pretrain.py $$family-tiny --name $(RUN)-$$family $(TRAIN_FLAGS); done
	@echo "[3/6] fine-tuning every checkpoint on $(TASK)"
	@$(PY) finetune_glue.py $(RUNS) --checkpoints all --from_scratch $(TASK_FLAGS) \
		--max_len 64 --seeds 1 --lr 5e-4 --epochs 3 --batch_size 32
	@echo "[4/6] filling in masks with the run of lowest held-out loss"
	@run=$(BEST) && echo "$$run" && $(PY) fill_mask.py $$run \
		"if the file does not [MASK], an error is raised." \
		"this function [MASK] a list of strings." "the default [MASK] is none." \
		"return the number of [MASK] in the array." "it is one of the [MASK] important parts of the world."
	@echo "[5/6] accuracy against pretraining time"
	@$(PY) plots.py pareto $(RUNS) --out plots/pareto.png
	@echo "[6/6] loss against tokens"
	@$(PY) plots.py loss $(RUNS) --out plots/loss.png
	@echo "done: $(RUNS); tables in runs/*/glue/, figures plots/pareto.png and plots/loss.png"

test: .venv/installed-dev
	$(PY) -m pytest

test-slow: .venv/installed-dev
	$(PY) -m pytest -m slow

lint: .venv/installed-dev
	$(PY) -m ruff check

# a figure whose data is not there yet says so and is left out
plots: .venv/installed
	@for figure in pareto loss; do $(PY) plots.py $$figure runs/* || true; done
	@for sweep in results/*/records.jsonl; do \
		$(PY) plots.py ablation $$sweep --out plots/$$(basename $$(dirname $$sweep)).png || true; done

bench: .venv/installed-dev
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(PY) -m bench.kernels; \
		else echo "no CUDA device here: the kernels are not timed"; fi
	$(PY) -m bench.step
	$(PY) -m bench.data

# the environments, what demos made, and all of plots/
clean:
	rm -rf .venv data/demo-* runs/demo-* plots
