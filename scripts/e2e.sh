#!/usr/bin/env bash
# E2E NLG with LoRA: Hu et al. 2021 (arXiv 2106.09685), table 3, row "GPT-2 M (LoRA)", r 4 on q, v.
# 42,061 rows, 5 epochs of 5,258 steps, 26,290 in all; 393,216 trained parameters (the table's 0.35 M
# is not this product); 630 distinct test inputs, 4,693 references.
#
# Expect, with GPT-2 medium and its last epoch, BLEU 68.7 to 69.0: six of seven published reruns of
# the original code lie there (its issue 165; FourierFT, arXiv 2405.03003, table 3: 68.9 +- .3). The
# paper's 70.4 +- .1 is the best epoch of each of three seeds, which SELECT=best decodes too. Both length penalties in use are
# decoded: 0.8 (the original's README) and 0.9 (the paper).
#
# Cost, none of it measured: on one card that sustains 10 TFLOP/s about 40 minutes; on 2 CPU cores
# about 40 hours: 26,290 steps of 4.3 s, 18 validations of 23 minutes, 2 x 630 searches of 4.6 s. That
# is what gpt2.sm was measured to take (docs/performance.md) times 3.2, as medium multiplies so much
# more, and by the length of the rows.
#
# What may be set is in pipeline.sh. The nano base needs a higher learning rate than GPT-2; to
# see the whole path in minutes:
#   MODEL=gpt2.nano TRAIN_ROWS=8000 VALID_ROWS=400 TEST_ROWS=1000 MAX_STEP=1000 WARMUP_STEP=100 \
#     LR=5e-3 bash scripts/e2e.sh
set -euo pipefail
cd "$(dirname "$0")/.."
task=e2e
recipe=(--lora_dim 4 --lora_alpha 32 --lora_dropout 0.1 --label_smooth 0.1 --lr 2e-4
  --weight_decay 0.01 --train_batch_size 8 --max_epoch 5 --seq_len 512)
length_penalties=(0.8 0.9)
published=(
  "GPT-2 M, paper, best epoch: BLEU=.704 NIST=8.85 METEOR=.468 ROUGE_L=.718 CIDEr=2.53"
  "GPT-2 M, FourierFT's rerun: BLEU=.689 NIST=8.76 METEOR=.466 ROUGE_L=.715 CIDEr=2.53"
  "GPT-2 L, paper, best epoch: BLEU=.704 NIST=8.89 METEOR=.468 ROUGE_L=.720 CIDEr=2.47"
  "GPT-2 L, FourierFT's rerun: BLEU=.701 NIST=8.83 METEOR=.468 ROUGE_L=.720 CIDEr=2.47"
)
source scripts/pipeline.sh
run_pipeline "$@"
