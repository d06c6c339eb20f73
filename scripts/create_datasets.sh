#!/usr/bin/env bash
# Raw data to datasets/{e2e,webnlg,dart}/{train,valid,test}.jsonl:
#   bash scripts/create_datasets.sh [e2e] [webnlg] [dart]      all three when none is named
# Raw files, plain or .gz, are read from DATA_DIR (TASK/FILE in it) where that has them; the others
# are downloaded into data_raw/, unless the split has been made already.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} # with the packages of requirements.txt

convert() { # TASK FILE SPLIT
  local target=datasets/$1/$3.jsonl source=
  for source in ${DATA_DIR:+"$DATA_DIR/$1/$2" "$DATA_DIR/$1/$2.gz"}; do
    if [ -f "$source" ]; then
      "$python" -m "data.convert_$1" "$source" "$target"
      return
    fi
  done
  if [ -f "$target" ]; then
    echo "$target is already there"
    return
  fi
  "$python" -m data.download "$1" "data_raw/$1" "$2" || return
  "$python" -m "data.convert_$1" "data_raw/$1/$2" "$target"
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
      # With all three data sets, a training file that cannot be downloaded stops none of the rest.
      convert dart dart-v1.1.1-full-train.json train || [ $# = 0 ] || exit 2 ;;
    *)
      echo "error: $task is not a data set; name e2e, webnlg or dart" >&2
      exit 2 ;;
  esac
done
