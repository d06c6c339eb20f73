# Sourced by e2e.sh, webnlg.sh and dart.sh, which set the recipe: raw data, training, beam search,
# scores, a result JSON and its table. Stops at the first step that fails.
#
#   bash scripts/e2e.sh --dry_run      sizes and steps of the run; needs no weights, trains nothing
#   bash scripts/e2e.sh                the run; again with RESUME=1 it continues
#   SEEDS="110 111 112" bash scripts/e2e.sh    one run per seed, in WORK_DIR/seed-N; mean +- sd
#
#   METHOD=lora            or adapter_l, adapter_h, prefix, full, top2, bitfit: see methods.sh
#   MODEL=gpt2.md          card; gpt2.sm, md, lg, xl are downloaded, gpt2.nano and mini shipped
#   INIT_CHECKPOINT=FILE   base weights of your own; VOCAB=FOLDER their vocabulary
#   NPROC=1                processes on this machine; the global batch grows with it
#   SELECT=last|best       decodes the last adapter, as reruns of the original do; or the epoch with the
#                          best BLEU on the validation data, as the paper does, and then the last
#   SEED=110  PRECISION=fp32|bf16|fp16  WORK_DIR=runs/TASK or runs/TASK-METHOD  RESUME=1
#   DATA_DIR=FOLDER        raw data and vocabulary; what it lacks is downloaded
#   TRAIN_ROWS= VALID_ROWS= TEST_ROWS= MAX_STEP= WARMUP_STEP= LR= SEQ_LEN=  smaller than real; of
#                          MAX_STEP a tenth is warm-up where the recipe's is longer

source scripts/venv.sh requirements.txt
source scripts/methods.sh
method=${METHOD:-lora}
warmup=500
decoding=(--no_repeat_ngram_size 4)
threads=$(($(cores) / ${NPROC:-1}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
work_dir=${WORK_DIR:-runs/$task}
[ -n "${WORK_DIR:-}" ] || [ "$method" = lora ] || work_dir=$work_dir-$method
final_dir=$work_dir
launch=(python)
[ "${NPROC:-1}" -le 1 ] || launch=(torchrun --standalone --nproc_per_node "$NPROC")

say() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

fail() {
  echo "error: $1" >&2
  exit 2
}

# Sets card, base and vocab; downloads published weights and their vocabulary.
choose_base() {
  local shipped='' published=''
  card=${MODEL:-gpt2.md} base=${INIT_CHECKPOINT:-} vocab=${VOCAB:-vocab}
  case $card in
    gpt2.nano | gpt2.mini) shipped=data/${card#gpt2.} ;;
    gpt2.sm) published=gpt2 ;;
    gpt2.md) published=gpt2-medium ;;
    gpt2.lg) published=gpt2-large ;;
    gpt2.xl) published=gpt2-xl ;;
    *) fail "MODEL=$card is not a model card; name gpt2.nano, mini, sm, md, lg or xl" ;;
  esac
  if [ -z "$base" ] && [ -n "$shipped" ]; then
    base=$shipped/model.safetensors vocab=${VOCAB:-$shipped}
    [ -f "$base" ] || fail "MODEL=$card: $base is missing; make it by python -m data.make_base ${card#gpt2.}"
  elif [ -z "$base" ]; then
    base=$published
    [ -n "$dry_run" ] || python -m data.download_weights "$base"
  fi
  if [ "$vocab" = vocab ] && [ ! -f vocab/vocab.bpe ] && [ ! -f vocab/merges.txt ]; then
    bash scripts/download_vocab.sh
  fi
}

# The first $3 rows of a split, or all of them.
take() {
  mkdir -p "$work_dir"
  if [ -n "${3:-}" ]; then head -n "$3"; else cat; fi < "datasets/$task/$1.jsonl" > "$work_dir/$2.jsonl"
}

# The steps of warm-up: those that are given, or the recipe's, which a shorter run may not have.
warmup_steps() {
  local steps=$warmup tenth=${MAX_STEP:-}
  tenth=$((${tenth%%[!0-9]*}0 / 100)) # 0 for what is no number, which the trainer refuses
  if [ -n "${MAX_STEP:-}" ] && [ "$tenth" -lt "$steps" ]; then steps=$tenth; fi
  echo "${WARMUP_STEP:-$steps}"
}

fine_tune() { # FOLDER SEED [FLAG]...
  local folder=$1 seed=$2 flags=("${recipe[@]}" "${@:3}") # never empty, which old bash refuses
  [ "${PRECISION:-fp32}" = fp32 ] || flags+=("--$PRECISION")
  [ -z "${MAX_STEP:-}" ] || flags+=(--max_step "$MAX_STEP")
  [ -z "${LR:-}" ] || flags+=(--lr "$LR")
  [ -z "${SEQ_LEN:-}" ] || flags+=(--seq_len "$SEQ_LEN")
  [ -z "${RESUME:-}" ] || flags+=(--resume auto)
  [ "${SELECT:-last}" = last ] || flags+=("${by_bleu[@]}")
  "${launch[@]}" gpt2_ft.py --train_data "$work_dir/train.jsonl" --valid_data "$work_dir/valid.jsonl" \
    --model_card "$card" --init_checkpoint "$base" --vocab "$vocab" --random_seed "$seed" \
    --work_dir "$folder" --warmup_step "$(warmup_steps)" "${flags[@]}"
}

decode() { # FOLDER WHICH LENGTH_PENALTY OUTPUT
  "${launch[@]}" gpt2_beam.py --data "$work_dir/test.jsonl" --adapter "$1/train:$2" \
    --init_checkpoint "$base" --vocab "$vocab" --length_penalty "$3" \
    "${decoding[@]}" --output_file "$4.jsonl"
}

score() { # OUTPUT ROW NAME [FLAG]...
  echo "-- $3"
  python -m eval.evaluate --task "$task" --data "$work_dir/test.jsonl" \
    --predictions "$1.jsonl" --json "$1.$3.json" "${@:4}"
  results+=("$2, $3=$1.$3.json")
}

# Scores of one adapter for each length penalty: by the published rule, if that drops references,
# and with all.
decode_and_score() { # FOLDER WHICH
  local penalty output row
  for penalty in "${length_penalties[@]}"; do
    output=$1/beam.$penalty row="lp $penalty"
    [ "$2" = last ] || output=$1/$2.beam.$penalty
    [ "${SELECT:-last}" = last ] || row="$2, $row"
    say "Decoding and scoring the $2 adapter, length penalty $penalty"
    decode "$1" "$2" "$penalty" "$output"
    if [ -n "${ref_num:-}" ]; then score "$output" "$row" "ref_num_$ref_num" --ref_num "$ref_num"; fi
    score "$output" "$row" all_references
  done
}

run_seed() { # SEED FOLDER
  local folder=$2 started=$SECONDS trained
  local results=()
  if [ -n "${RESUME:-}" ] && [ -f "$folder/result.json" ]; then
    echo "$folder/result.json is already there"
    return
  fi
  say "Fine-tuning, seed $1"
  fine_tune "$folder/train" "$1"
  trained=$SECONDS
  [ "${SELECT:-last}" = last ] || decode_and_score "$folder" best
  decode_and_score "$folder" last
  say "Result"
  python -m eval.summary --json "$folder/result.json" --run "$folder/train" \
    --seconds "train=$((trained - started))" "decode_and_score=$((SECONDS - trained))" \
    --published ${published[@]+"${published[@]}"} -- "${results[@]}"
}

# Stops where a run is already, before its data are written anew.
refuse_second_run() {
  local name
  [ -z "${RESUME:-}" ] || return 0
  for name in ${SEEDS:-.}; do
    [ "$name" = . ] || name=seed-$name
    if [ -f "$work_dir/$name/train/run.json" ]; then
      fail "WORK_DIR=$work_dir holds a run already; set RESUME=1 to resume it, or another WORK_DIR"
    fi
  done
}

run_pipeline() { # [--dry_run]
  local seed results=() dry_run=${1:-}
  if [ $# -gt 1 ] || [ "${dry_run:---dry_run}" != --dry_run ]; then
    fail "$* is not --dry_run, the only argument; scripts/pipeline.sh lists the variables that set the rest"
  fi
  case ${SELECT:-last} in
    last | best) ;;
    *) fail "SELECT=$SELECT is neither last nor best" ;;
  esac
  if [ -n "$dry_run" ]; then
    work_dir=$(mktemp -d)
    trap 'rm -rf "$work_dir"' EXIT
  fi
  refuse_second_run
  choose_method
  # Validation at the ends of epochs alone, with the first of the settings that decode the test data.
  by_bleu=(--valid_metric bleu --valid_task "$task" --eval_interval 1000000000
    --valid_length_penalty "${length_penalties[0]}" "${decoding[@]/#--/--valid_}")
  say "Data"
  bash scripts/create_datasets.sh "$task"
  choose_base
  take train train "${TRAIN_ROWS:-}"
  take valid valid "${VALID_ROWS:-}"
  take test test "${TEST_ROWS:-}"
  if [ -n "$dry_run" ]; then
    fine_tune "$final_dir/train" "${SEED:-110}" --dry_run
    [ "${SELECT:-last}" = last ] || echo "Decoded and scored: the best epoch and the last"
    return
  fi
  if [ -z "${SEEDS:-}" ]; then
    run_seed "${SEED:-110}" "$work_dir"
    return
  fi
  for seed in $SEEDS; do
    run_seed "$seed" "$work_dir/seed-$seed"
    results+=("$work_dir/seed-$seed/result.json")
  done
  say "Mean and standard deviation of seeds $SEEDS"
  python -m eval.summary --json "$work_dir/result.json" --mean \
    --published ${published[@]+"${published[@]}"} -- "${results[@]}"
}
