#!/usr/bin/env bash
# Checks the code's style and types and runs every test. Arguments go to pytest: scripts/test.sh -k beam
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements-dev.txt
ruff check .
ruff format --check .
mypy
workers=${WORKERS:-$(cores)}
# One torch thread per worker: the tests' matrices are small, and spinning threads only contend.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest -n "$workers" "$@"
