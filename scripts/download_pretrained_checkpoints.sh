#!/usr/bin/env bash
# Pretrained GPT-2 weights into pretrained_checkpoints/NAME/model.safetensors, transfers resumed:
#   bash scripts/download_pretrained_checkpoints.sh [gpt2] [gpt2-medium] [gpt2-large] [gpt2-xl]
# gpt2-medium (1.5 GB) when none is named. MIRROR (a folder or an address) is looked into first;
# HF_ENDPOINT stands in for https://huggingface.co.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} # the standard library is enough
for name in "${@:-gpt2-medium}"; do
  "$python" -m data.download "$name" "pretrained_checkpoints/$name"
done
