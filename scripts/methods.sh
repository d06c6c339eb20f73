# Sourced by pipeline.sh: METHOD=adapter_l, adapter_h, prefix, full, top2 or bitfit, with the recipe
# of its row in table 3 of the LoRA paper (Hu et al. 2021, arXiv 2106.09685) and what it prints.
#
# Hu et al. refer for their baselines (appendix D.3) to Li and Liang 2021 (arXiv 2101.00190), whose
# table 5 has the learning rates, epochs and batches; beam 5 and the linear schedule are in their
# section 5.3, "the default setup" of transformers. That setup, of late 2020, is what they leave
# open: no warm-up, decay or smoothing, gradients clipped at 1, length penalty 1, no ban of n-grams.
# Their decoding forbids a blank line; here it ends a text.
#
# AdapterH is Hu et al.'s own run, without a recipe in print: it gets that of the large AdapterL.
# BitFit has no published recipe for these tasks: rate 1e-3 is a guess, 5 epochs of 8 are LoRA's.
#
#   ADAPTER_DIM=N      adapter_l: 6 (0.37 M, the default) or 224 (11.09 M) on gpt2.md, on gpt2.lg 8
#                      or 248; adapter_h: 112 (11.06 M; the paper's 11.09 M is no whole width)
#   PREFIX_LENGTH=N    virtual tokens: 5, for DART 10

# Sets recipe, decoding, length_penalties, warmup and published where METHOD is not lora.
choose_method() {
  local row=$method own=()
  case $method in
    lora) return ;;
    adapter_l | adapter_h)
      own=(--adapter_dim "$(adapter_dim)")
      if [ "${own[1]}" -lt 64 ]; then row=adapter_small; else row=adapter_large; fi
      ;;
    prefix)
      own=(--prefix_length "${PREFIX_LENGTH:-$([ "$task" = dart ] && echo 10 || echo 5)}")
      ;;
  esac
  case $row/$task in # learning rate, epochs, batch
    prefix/e2e) set -- 8e-5 5 10 ;;
    prefix/webnlg) set -- 5e-5 5 5 ;;
    prefix/dart) set -- 5e-5 10 5 ;;
    adapter_small/e2e) set -- 8e-5 10 5 ;;
    adapter_small/webnlg) set -- 5e-5 10 5 ;;
    adapter_small/dart) set -- 8e-5 5 5 ;;
    adapter_large/*) set -- 5e-5 5 5 ;;
    full/e2e) set -- 5e-5 5 10 ;;
    full/*) set -- 1e-5 10 6 ;;
    top2/e2e) set -- 5e-5 5 10 ;;
    top2/webnlg) set -- 5e-5 10 9 ;;
    top2/dart) set -- 5e-5 5 5 ;;
    bitfit/*) set -- 1e-3 5 8 ;;
    *) fail "METHOD=$method is none of lora, adapter_l, adapter_h, prefix, full, top2 and bitfit" ;;
  esac
  recipe=(--method "$method" ${own[@]+"${own[@]}"} --lr "$1" --max_epoch "$2"
    --train_batch_size "$3" --clip 1 --adam_epsilon 1e-8 --weight_decay 0 --label_smooth 0)
  warmup=0
  decoding=(--beam 5 --no_repeat_ngram_size 0)
  length_penalties=(1.0)
  choose_published
}

adapter_dim() {
  case $method/${MODEL:-gpt2.md} in
    adapter_h/*) echo "${ADAPTER_DIM:-112}" ;;
    */gpt2.lg) echo "${ADAPTER_DIM:-8}" ;;
    *) echo "${ADAPTER_DIM:-6}" ;;
  esac
}

# Sets published to what Hu et al. print for the method, in table 3 and in the appendix.
choose_published() {
  published=()
  case $method/$task in
    full/e2e)
      published=(
        "GPT-2 M, paper: BLEU=.682 NIST=8.62 METEOR=.462 ROUGE_L=.710 CIDEr=2.47"
        "GPT-2 L, paper: BLEU=.685 NIST=8.78 METEOR=.460 ROUGE_L=.699 CIDEr=2.45"
      )
      ;;
    adapter_l/e2e)
      published=(
        "GPT-2 M, paper, 0.37 M: BLEU=.663 NIST=8.41 METEOR=.450 ROUGE_L=.698 CIDEr=2.40"
        "GPT-2 M, paper, 11.09 M: BLEU=.689 NIST=8.71 METEOR=.461 ROUGE_L=.713 CIDEr=2.47"
        "GPT-2 L, paper, 0.88 M: BLEU=.691 NIST=8.68 METEOR=.463 ROUGE_L=.714 CIDEr=2.49"
        "GPT-2 L, paper, 23.00 M: BLEU=.689 NIST=8.70 METEOR=.461 ROUGE_L=.713 CIDEr=2.45"
      )
      ;;
    adapter_h/e2e)
      published=(
        "GPT-2 M, paper: BLEU=.673 NIST=8.50 METEOR=.460 ROUGE_L=.707 CIDEr=2.44"
      )
      ;;
    top2/e2e)
      published=(
        "GPT-2 M, paper: BLEU=.681 NIST=8.59 METEOR=.460 ROUGE_L=.708 CIDEr=2.41"
      )
      ;;
    prefix/e2e)
      published=(
        "GPT-2 M, paper: BLEU=.697 NIST=8.81 METEOR=.461 ROUGE_L=.714 CIDEr=2.49"
        "GPT-2 L, paper: BLEU=.703 NIST=8.85 METEOR=.462 ROUGE_L=.717 CIDEr=2.47"
      )
      ;;
    full/webnlg)
      published=(
        "GPT-2 M, paper: BLEU=.465 METEOR=.38 TER=.53"
        "GPT-2 M, paper, seen: BLEU=.642 METEOR=.45 TER=.33"
        "GPT-2 M, paper, unseen: BLEU=.277 METEOR=.30 TER=.76"
        "GPT-2 L, paper: BLEU=.555 METEOR=.42 TER=.42"
      )
      ;;
    adapter_l/webnlg)
      published=(
        "GPT-2 M, paper, 0.37 M: BLEU=.502 METEOR=.38 TER=.43"
        "GPT-2 M, paper, 0.37 M, seen: BLEU=.545 METEOR=.39 TER=.40"
        "GPT-2 M, paper, 0.37 M, unseen: BLEU=.451 METEOR=.36 TER=.46"
        "GPT-2 M, paper, 11.09 M: BLEU=.549 METEOR=.41 TER=.39"
        "GPT-2 M, paper, 11.09 M, seen: BLEU=.604 METEOR=.43 TER=.35"
        "GPT-2 M, paper, 11.09 M, unseen: BLEU=.483 METEOR=.38 TER=.45"
        "GPT-2 L, paper, 0.88 M: BLEU=.560 METEOR=.41 TER=.39"
        "GPT-2 L, paper, 23.00 M: BLEU=.577 METEOR=.43 TER=.39"
      )
      ;;
    top2/webnlg)
      published=(
        "GPT-2 M, paper: BLEU=.360 METEOR=.31 TER=.72"
        "GPT-2 M, paper, seen: BLEU=.536 METEOR=.38 TER=.49"
        "GPT-2 M, paper, unseen: BLEU=.189 METEOR=.23 TER=.99"
      )
      ;;
    prefix/webnlg)
      published=(
        "GPT-2 M, paper: BLEU=.551 METEOR=.41 TER=.40"
        "GPT-2 M, paper, seen: BLEU=.629 METEOR=.44 TER=.35"
        "GPT-2 M, paper, unseen: BLEU=.456 METEOR=.38 TER=.49"
        "GPT-2 L, paper: BLEU=.563 METEOR=.42 TER=.40"
      )
      ;;
    full/dart)
      published=(
        "GPT-2 M, paper: BLEU=.462 METEOR=.39 TER=.46"
        "GPT-2 L, paper: BLEU=.470 METEOR=.39 TER=.46"
      )
      ;;
    adapter_l/dart)
      published=(
        "GPT-2 M, paper, 0.37 M: BLEU=.424 METEOR=.36 TER=.48"
        "GPT-2 M, paper, 11.09 M: BLEU=.452 METEOR=.38 TER=.46"
        "GPT-2 L, paper, 0.88 M: BLEU=.457 METEOR=.38 TER=.46"
        "GPT-2 L, paper, 23.00 M: BLEU=.471 METEOR=.39 TER=.45"
      )
      ;;
    top2/dart)
      published=(
        "GPT-2 M, paper: BLEU=.410 METEOR=.34 TER=.56"
      )
      ;;
    prefix/dart)
      published=(
        "GPT-2 M, paper: BLEU=.464 METEOR=.38 TER=.46"
        "GPT-2 L, paper: BLEU=.467 METEOR=.38 TER=.45"
      )
      ;;
  esac
}
