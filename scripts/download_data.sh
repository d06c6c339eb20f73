#!/usr/bin/env bash
# Raw data of the benchmarks into data_raw/, checksums verified, broken transfers resumed:
#   bash scripts/download_data.sh [e2e] [webnlg] [dart]        all three when none is named
# DATA_DIR (a folder) and MIRROR (a folder or an address) are looked into first.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} # the standard library is enough
for task in ${*:-e2e webnlg dart}; do
  "$python" -m data.download "$task" "data_raw/$task"
done
