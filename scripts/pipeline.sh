# Sourced by e2e.sh, webnlg.sh and dart.sh, which set the recipe: raw data, training, beam search,
# scores. Stops at the first step that fails; started again with RESUME=1 it goes on from there.
#
#   MODEL=gpt2.md          card; its weights are looked for in pretrained_checkpoints/
#   INIT_CHECKPOINT=FILE   base weights of your own; VOCAB=FOLDER their vocabulary
#   NPROC=1                processes on this machine; the global batch grows with it
#   SEED=110  PRECISION=fp32|bf16|fp16  WORK_DIR=runs/TASK  RESUME=1
#   DATA_DIR=FOLDER        raw data; otherwise ../shared/data, otherwise downloaded
#   TRAIN_ROWS= VALID_ROWS= TEST_ROWS= MAX_STEP= WARMUP_STEP= LR=  smaller than the real thing

source scripts/venv.sh requirements.txt
threads=$(($(nproc) / ${NPROC:-1}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
work_dir=${WORK_DIR:-runs/$task}

say() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

choose_base() {
  local -A folders=([gpt2.sm]=gpt2 [gpt2.md]=gpt2-medium [gpt2.lg]=gpt2-large [gpt2.xl]=gpt2-xl)
  card=${MODEL:-gpt2.md}
  base=${INIT_CHECKPOINT:-pretrained_checkpoints/${folders[$card]:-none}/model.safetensors}
  vocab=${VOCAB:-vocab}
  if [ -z "${INIT_CHECKPOINT:-}" ] && [ ! -f "$base" ]; then
    echo "No pretrained weights at $base (scripts/download_pretrained_checkpoints.sh has them):"
    echo "starting from the shipped nano base with its own vocabulary. Expect none of the above scores."
    card=gpt2.nano base=data/nano/model.safetensors vocab=data/nano
  fi
}

# The first $3 rows of a split, or all of them.
take() {
  mkdir -p "$work_dir"
  head -n "${3:--0}" "datasets/$task/$1.jsonl" > "$work_dir/$2.jsonl"
}

train() {
  local launch=(python) flags=()
  [ "${NPROC:-1}" -gt 1 ] && launch=(torchrun --standalone --nproc_per_node "$NPROC")
  [ "${PRECISION:-fp32}" != fp32 ] && flags+=("--$PRECISION")
  [ -n "${MAX_STEP:-}" ] && flags+=(--max_step "$MAX_STEP")
  [ -n "${LR:-}" ] && flags+=(--lr "$LR")
  [ -n "${RESUME:-}" ] && flags+=(--resume auto)
  "${launch[@]}" gpt2_ft.py --train_data "$work_dir/train.jsonl" --valid_data "$work_dir/valid.jsonl" \
    --model_card "$card" --init_checkpoint "$base" --vocab "$vocab" --random_seed "${SEED:-110}" \
    --work_dir "$work_dir/train" --warmup_step "${WARMUP_STEP:-500}" "${recipe[@]}" "${flags[@]}"
}

# Decodes with a length penalty, then scores: with all references, and by the rule of ref_num.
decode_and_score() {
  local out=$work_dir/beam.$1
  python gpt2_beam.py --data "$work_dir/test.jsonl" --adapter "$work_dir/train" \
    --init_checkpoint "$base" --vocab "$vocab" --length_penalty "$1" --output_file "$out.jsonl"
  score all_references "$out"
  if [ -n "${ref_num:-}" ]; then score "ref_num_$ref_num" "$out" --ref_num "$ref_num"; fi
}

score() {
  local name=$1 out=$2
  shift 2
  echo "-- $name"
  python eval/evaluate.py --task "$task" --data "$work_dir/test.jsonl" \
    --predictions "$out.jsonl" --json "$out.$name.json" "$@"
}

run_pipeline() {
  choose_base
  say "Data"
  bash scripts/create_datasets.sh "$task"
  take train train "${TRAIN_ROWS:-}"
  take valid valid "${VALID_ROWS:-}"
  take test test "${TEST_ROWS:-}"
  say "Fine-tuning"
  train
  for penalty in "${length_penalties[@]}"; do
    say "Decoding and scoring, length penalty $penalty"
    decode_and_score "$penalty"
  done
  say "Done; scores are in $work_dir/beam.*.json"
}
