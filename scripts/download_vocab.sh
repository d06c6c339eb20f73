#!/usr/bin/env bash
# GPT-2's vocabulary (encoder.json, vocab.bpe) into vocab/, checksums verified.
# DATA_DIR (a folder) and MIRROR (a folder or an address) are looked into first.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} # the standard library is enough
"$python" -m data.download gpt2_vocab vocab
