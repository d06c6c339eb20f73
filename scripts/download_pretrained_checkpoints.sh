#!/usr/bin/env bash
# Pretrained GPT-2 weights into the Hugging Face cache, transfers resumed, checksums verified:
#   bash scripts/download_pretrained_checkpoints.sh [gpt2] [gpt2-medium] [gpt2-large] [gpt2-xl]
# gpt2-medium (1.5 GB) when none is named. --init_checkpoint gpt2-medium then finds them, and would
# download them itself. HF_ENDPOINT stands in for https://huggingface.co, HF_HOME for the cache; a
# file at pretrained_checkpoints/NAME/model.safetensors is taken in place of the hub's.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements.txt
python -m data.download_weights "${@:-gpt2-medium}"
