#!/usr/bin/env bash
# Trains the shipped sample twice for 30 steps: once undisturbed, once killed by `kill -9` after a
# save and resumed. The last adapters must be the same bytes; prints their sha256.
# Expect under a minute on 2 CPU cores. Everything goes into runs/kill_and_resume, emptied first.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements.txt
out=runs/kill_and_resume
rm -rf "$out"
mkdir -p "$out"
train="python gpt2_ft.py --max_step 30 --warmup_step 5 --save_interval 5 --log_interval 10"

echo "== Training, undisturbed"
$train --work_dir "$out/whole" > "$out/whole.log"
echo "== Training again, killed by signal 9 after step 10"
$train --work_dir "$out/killed" > "$out/killed.log" & pid=$!
until [ -f "$out/killed/model.10.safetensors" ] || ! kill -0 $pid; do sleep 0.1; done
{ kill -9 $pid && wait $pid; } 2> /dev/null || true
echo "== Resuming"
$train --work_dir "$out/killed" --resume auto > "$out/resumed.log"
grep Resuming "$out/resumed.log"

python - "$out"/{whole,killed}/model.30.safetensors <<'END'
import hashlib, sys
sums = [hashlib.sha256(open(path, "rb").read()).hexdigest() for path in sys.argv[1:]]
print(*map("  ".join, zip(sums, sys.argv[1:])), sep="\n")
sys.exit("error: the adapters differ" if sums[0] != sums[1] else print("The same bytes."))
END
