#!/usr/bin/env bash
# E2E NLG with LoRA: Hu et al. 2021 (arXiv 2106.09685), table 3, row "GPT-2 M (LoRA)", r 4 on q, v.
# 42,061 rows, 5 epochs of 5,258 steps, 26,290 in all; 630 distinct test inputs, 4,693 references.
# Expect, with GPT-2 medium and its last epoch, BLEU 68.7 to 69.0 (what people get who rerun the
# original code); the paper's 70.4 is the best epoch of each run. Both length penalties in use are
# decoded: 0.8 (the original's README) and 0.9 (the paper). What may be set is in pipeline.sh.
# The nano base wants a higher rate than GPT-2; for a look at the whole path in minutes:
#   TRAIN_ROWS=8000 VALID_ROWS=400 TEST_ROWS=1000 MAX_STEP=1000 WARMUP_STEP=100 LR=5e-3 \
#     bash scripts/e2e.sh
set -euo pipefail
cd "$(dirname "$0")/.."
task=e2e
recipe=(--lora_dim 4 --lora_alpha 32 --lora_dropout 0.1 --label_smooth 0.1 --lr 2e-4
  --weight_decay 0.01 --train_batch_size 8 --max_epoch 5 --seq_len 512)
length_penalties=(0.8 0.9)
source scripts/pipeline.sh
run_pipeline
