# make demo    the whole pipeline on two CPU cores, 9 to 12 minutes:  make demo [SOURCE=...] [TASK=RTE GLUE_DIR=...]
# make test    the test suite;  make test-slow  the longer proofs;  make lint  ruff
# make plots   every plot of runs/ and results/;  make bench  kernels, training step and data preparation against peers

SOURCE ?= docstrings
MINUTES ?= 2
VOCAB ?= 4096
# the labelled task: derived from held-out text of the corpus, or a GLUE task from local files
TASK ?= word-order
GLUE_DIR ?=
# names that keep demos with other settings apart
NAME := demo-$(basename $(basename $(notdir $(SOURCE:/=))))-$(VOCAB)-$(TASK)
DATA := data/$(NAME)
RUN := $(NAME)-$(MINUTES)min
RUNS := runs/$(RUN)
# short windows: in two minutes a small BERT learns from 32 tokens what order is, from 128 it does not (LOG.md)
TRAIN_FLAGS = --data $(DATA) --seq_len 32 --max_minutes $(MINUTES) --checkpoint_every 0.25
# all of C4 takes hours: a demo takes its beginning
LIMIT = $(if $(filter c4,$(SOURCE)),--max_docs 20000)
ifeq ($(TASK),word-order)
EXAMPLES = 4000
TASK_FLAGS = --task $(DATA)/task/train.tsv --eval $(DATA)/task/dev.tsv --task_name word-order
else
EXAMPLES = 0
TASK_FLAGS = --task $(TASK) $(if $(GLUE_DIR),--glue_dir $(GLUE_DIR))
endif

# PyTorch's CPU threads wait without spinning: 15 % slower on an idle machine, 7 to 10 times faster on a busy one
export OMP_WAIT_POLICY ?= PASSIVE

PYTHON ?= python3
PY = .venv/bin/python
# No GPU: prefer PyTorch's CPU wheels (0.2 GB) to the CUDA ones (several GB) if their index answers.
CPU_INDEX = https://download.pytorch.org/whl/cpu

.PHONY: demo test test-slow lint plots bench clean

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
		echo "no NVIDIA GPU: looking for the CPU build of torch"; \
		$(PY) -m pip install --quiet --retries 0 --timeout 10 --index-url $(CPU_INDEX) "$$(grep '^torch' requirements.txt)" \
			>/dev/null 2>&1 || echo "its index does not answer; taking torch from the default index"; \
	fi
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: .venv/installed
	@echo "[1/6] corpus, tokenizer and a labelled task from $(SOURCE) -> $(DATA)"
	@$(PY) prepare_c4.py $(SOURCE) --out $(DATA) --vocab_size $(VOCAB) --val_fraction 0.02 --task_examples $(EXAMPLES) $(LIMIT)
	@echo "[2/6] pretraining a MosaicBERT shape for $(MINUTES) minutes -> $(RUNS)-mosaic"
	@$(PY) pretrain.py mosaic-tiny --name $(RUN)-mosaic $(TRAIN_FLAGS)
	@echo "[3/6] pretraining a BERT shape for $(MINUTES) minutes -> $(RUNS)-bert"
	@$(PY) pretrain.py bert-tiny --name $(RUN)-bert $(TRAIN_FLAGS)
	@echo "[4/6] fine-tuning every checkpoint of both on $(TASK)"
	@$(PY) finetune_glue.py $(RUNS)-mosaic $(RUNS)-bert --checkpoints all --from_scratch $(TASK_FLAGS) \
		--max_len 64 --seeds 1 --lr 5e-4 --epochs 3 --batch_size 32
	@echo "[5/6] filling in masks"
	@$(PY) fill_mask.py $(RUNS)-mosaic "if the file does not [MASK], an error is raised." \
		"this function [MASK] a list of strings." "the default [MASK] is none." \
		"return the number of [MASK] in the array." "it is one of the [MASK] important parts of the world."
	@echo "[6/6] plots"
	@$(PY) plots.py pareto $(RUNS)-mosaic $(RUNS)-bert --out plots/pareto.png
	@$(PY) plots.py loss $(RUNS)-mosaic $(RUNS)-bert --out plots/loss.png
	@echo "done: runs $(RUNS)-mosaic and $(RUNS)-bert, tables $(RUNS)-*/glue/, pictures plots/pareto.png and plots/loss.png"

test: .venv/installed
	$(PY) -m pytest

test-slow: .venv/installed
	$(PY) -m pytest -m slow

lint: .venv/installed
	$(PY) -m ruff check

# a figure whose data is not there yet says so and is left out
plots: .venv/installed
	@for figure in loss masking glue; do $(PY) plots.py $$figure runs/* || true; done
	@$(PY) plots.py throughput runs/* results/step-*.json || true
	@$(PY) plots.py pareto runs/* results/* || true
	@for sweep in results/*/records.jsonl; do \
		$(PY) plots.py ablation $$sweep --out plots/$$(basename $$(dirname $$sweep)).png || true; done
	@$(PY) plots.py kernels results/* || true

bench: .venv/installed
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(PY) -m bench.kernels; \
		else echo "no CUDA device here: the kernels are not timed"; fi
	$(PY) -m bench.step
	$(PY) -m bench.data

# the environment, what the demo made, and all of plots/
clean:
	rm -rf .venv data/demo-* runs/demo-* plots
