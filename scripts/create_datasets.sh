#!/usr/bin/env bash
# Raw data to datasets/{e2e,webnlg,dart}/{train,valid,test}.jsonl:
#   bash scripts/create_datasets.sh [e2e] [webnlg] [dart]      all three when none is named
# Raw files (plain or .gz) come from DATA_DIR, else from ../shared/data if it exists; what is not
# there is downloaded into data_raw/, unless its split stands already.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} # the standard library is enough
raw=${DATA_DIR:-../shared/data}

convert() { # TASK FILE SPLIT
  local target=datasets/$1/$3.jsonl source=$raw/$1/$2
  [ -f "$source" ] || source=$source.gz
  if [ ! -f "$source" ]; then
    [ ! -f "$target" ] || { echo "$target: is there already"; return; }
    "$python" -m data.download "$1" "data_raw/$1" "$2" || return
    source=data_raw/$1/$2
  fi
  "$python" -m "data.convert_$1" "$source" "$target"
}

for task in ${*:-e2e webnlg dart}; do
  case $task in
    e2e)
      for split in train valid test; do convert e2e $split.txt $split; done ;;
    webnlg)
      convert webnlg train.json train
      convert webnlg dev.json valid
      convert webnlg test.json test ;;
    dart)
      convert dart dart-v1.1.1-full-dev.json valid
      convert dart dart-v1.1.1-full-test.json test
      # Where all is made, a training file that cannot be had spoils nothing else.
      convert dart dart-v1.1.1-full-train.json train || [ $# = 0 ] || exit 2 ;;
    *)
      echo "error: $task is no data set; name e2e, webnlg or dart" >&2
      exit 2 ;;
  esac
done
