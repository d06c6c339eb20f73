"""Decode with GPT-2 and a LoRA adapter: adapter + JSONL -> beam search -> predictions.

    python gpt2_beam.py --adapter runs/001          the shipped sample with its nano base
    python gpt2_beam.py --data test.jsonl --vocab vocab --init_checkpoint gpt2-medium \\
        --adapter runs/e2e --output_file runs/e2e/predictions.jsonl
    python gpt2_beam.py --adapter e2e=runs/e2e --adapter webnlg=runs/webnlg ...
                                                    each row by the adapter that its `task` names
    torchrun --nproc_per_node 4 gpt2_beam.py ...    the same file, by four processes

The predictions file has one object for each row of the data, in its order: id, context, prediction
(token ids, the end id included), text (where --vocab is given), score, length, finished. Each
distinct context is searched once. Defaults are the published E2E settings.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import checkpoints
import gpu
from checkpoints import AdapterHeader
from checkpoints.base import BaseWeights
from common.errors import InputError
from common.errors import run as run_program
from common.files import replacing
from common.process_group import naming_lost_ranks
from data.fields import add_fields_flag
from data_utils import (
    END_OF_TEXT,
    Rows,
    default_end_ids,
    load_tokenizer,
    read_rows,
    repeats_ngram,
    vocabulary_fingerprint,
)
from decoding.beam_search import Hypothesis, SearchSettings, beam_search
from decoding.packed import pack
from gpu import Runtime
from model import MODEL_CARDS, GPT2LMModel

ROOT = Path(__file__).resolve().parent
SAMPLE = ROOT / "data" / "sample" / "settings.json"
GPT2_VOCABULARY = 50257
GPT2_END_IDS = [50256, 628]  # end of text, blank line
NGRAM_SIZE = SearchSettings.no_repeat_ngram_size
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}, {rate_noinv_fmt}, {remaining} left"

Context = tuple[int, ...]


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with the published E2E settings as defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu.add_gpu_params(parser)
    add = parser.add_argument_group("data").add_argument
    add("--data", help="JSONL, JSON, CSV or TSV with a context in each row (docs/data.md)")
    add_fields_flag(add)
    add("--vocab", help="folder of the vocabulary; needed for text, in and out")
    add("--seq_len", type=int, help="room for context and output (default: the model's window)")
    add("--batch_size", type=int, default=16, help="contexts searched at once; no effect on texts")
    add = parser.add_argument_group("model").add_argument
    add("--init_checkpoint", help="base weights: file, folder or gpt2[-medium, -large, -xl]")
    add(
        "--adapter",
        action="append",
        help="adapter file, PEFT folder, or the work_dir of a training: the last one in there. "
        "NAME=FILE, repeated, for rows that say their `task`; null is the base",
    )
    add("--allow_other_base", action="store_true", help="than the adapter was trained on")
    add("--model_card", help=f"{', '.join(MODEL_CARDS)} (default: the adapter's, or gpt2.md)")
    add("--lora_dim", type=int, help="default: the adapter's")
    add("--lora_alpha", type=float, help="default: the adapter's; its original files do not say it")
    add = parser.add_argument_group("search").add_argument
    add("--search", choices=("original", "hf"), default="original", help="hf: as transformers")
    add("--beam", type=int, default=10, help="default: %(default)s")
    add("--length_penalty", type=float, default=0.8, help="larger favours longer (default: 0.8)")
    add("--no_repeat_ngram_size", type=int, help=f"0 to allow all (default: {NGRAM_SIZE})")
    add("--repetition_penalty", type=float, default=1.0, help="1 for none (default: 1)")
    add("--min_length", type=int, default=0, help="in generated tokens (default: 0)")
    add("--eval_len", type=int, default=64, help="most generated tokens (default: 64)")
    add(
        "--eos_token_id",
        type=int,
        action="append",
        help="id that ends a text, may be repeated (default: end-of-text and the blank line)",
    )
    add("--num_return_sequences", type=int, default=1, help="more than 1 adds the n_best field")
    add = parser.add_argument_group("output").add_argument
    add("--work_dir", help="folder that --output_file is relative to")
    add("--output_file", help="default: predictions.jsonl in --work_dir, without that in runs")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments, with the sample's data, base and vocabulary where neither data nor base is given.

    Raises:
        InputError: an argument is missing or out of its range.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    args.uses_sample = not (args.data or args.init_checkpoint)
    if args.uses_sample:
        sample = json.loads(SAMPLE.read_text(encoding="utf-8"))
        args.data = str(SAMPLE.with_name("test.jsonl"))
        args.init_checkpoint = str(ROOT / sample["init_checkpoint"])
        args.vocab = args.vocab or str(ROOT / sample["vocab"])
        args.model_card = args.model_card or sample["model_card"]
    if not args.data:
        raise InputError("--data is missing; give a file with a context in each row")
    for name in ("batch_size", "beam", "eval_len", "num_return_sequences"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.num_return_sequences > args.beam:
        raise InputError(
            f"--num_return_sequences {args.num_return_sequences} is more than --beam {args.beam}"
        )
    args.adapters = name_adapters(args.adapter)
    folder = args.work_dir or ("" if args.output_file else "runs")
    args.output_file = str(Path(folder) / (args.output_file or "predictions.jsonl"))
    return args


def name_adapters(given: list[str] | None) -> dict[str | None, str | None]:
    """Task → adapter; the one task None where no names are given."""
    if not given:
        return {None: None}
    if len(given) == 1 and ("=" not in given[0] or Path(given[0]).exists()):
        return {None: given[0]}
    named = dict(text.split("=", 1) for text in given if "=" in text)
    if len(named) != len(given):
        raise InputError(
            "--adapter is given more than once; each needs a name of its own: e2e=FILE"
        )
    return {None: None} | named


def read_data(
    args: argparse.Namespace,
    runtime: Runtime,
    tokenizer: Tokenizer | None,
    base: BaseWeights,
) -> Rows:
    """The rows of the data, read and encoded once; says which columns were recognised, and warns
    of completions that the default ban of n-grams would not let be written."""
    rows = read_rows(
        args.data,
        tokenizer,
        vocab_size=base.vocab_size,
        need_completion=False,
        fields=args.fields,
        also=["task"] if len(args.adapters) > 1 else [],
    )
    if runtime.rank == 0:
        print(f"{args.data}: {len(rows):,} rows ({rows.source})")
        banned = sum(repeats_ngram(row.completion.tolist(), NGRAM_SIZE) for row in rows)
        if banned and args.no_repeat_ngram_size is None:
            print(
                f"warning: {banned:,} completions of the data repeat {NGRAM_SIZE} tokens in a row, "
                "which decoding will not; --no_repeat_ngram_size 0 allows it",
                file=sys.stderr,
            )
    return rows


def tasks_of_rows(args: argparse.Namespace, rows: Rows) -> list[str | None]:
    """Which adapter each row of the data asks for."""
    if len(args.adapters) == 1:
        return [None] * len(rows)
    for index, also in enumerate(rows.also):
        task = also.get("task", "")
        if not isinstance(task, str | None) or task not in args.adapters:
            names = ", ".join(filter(None, args.adapters))
            raise rows.error(
                index,
                f"task {task!r:.40} is none of the adapters ({names}) nor null, which is the base "
                "alone",
            )
    return [also["task"] for also in rows.also]


def check_vocabulary(
    args: argparse.Namespace, tokenizer: Tokenizer, model: GPT2LMModel, header: AdapterHeader | None
) -> None:
    """Refuse a vocabulary that is not the model's or not the one that the adapter learnt."""
    size = tokenizer.get_vocab_size()
    if size != model.config.vocab_size:
        raise InputError(
            f"--vocab {args.vocab} has {size} entries but --init_checkpoint {args.init_checkpoint} "
            f"{model.config.vocab_size}; give the vocabulary of that base"
        )
    trained = header and header.vocabulary
    if trained and trained.sha256 != vocabulary_fingerprint(tokenizer):
        raise InputError(f"--vocab {args.vocab} is not the one that --adapter was trained with")


def search_settings(
    args: argparse.Namespace, runtime: Runtime, tokenizer: Tokenizer | None, vocab_size: int
) -> SearchSettings:
    """The settings that the flags give; warns where texts may not find their end.

    Raises:
        InputError: a value is out of range, or the end ids are not known.
    """
    trained_end = None
    if tokenizer is not None:
        defaults = default_end_ids(tokenizer)
        trained_end = tokenizer.token_to_id(END_OF_TEXT)
    elif vocab_size == GPT2_VOCABULARY:
        defaults, trained_end = GPT2_END_IDS, GPT2_END_IDS[0]
    elif not args.eos_token_id:
        raise InputError(
            f"the end ids of a vocabulary of {vocab_size} entries are not known; give --vocab, or "
            "--eos_token_id"
        )
    end_ids = args.eos_token_id or defaults
    if outside := [i for i in end_ids if not 0 <= i < vocab_size]:
        raise InputError(f"--eos_token_id {outside[0]} is not a token id below {vocab_size}")
    if trained_end is not None and trained_end not in end_ids and runtime.rank == 0:
        both = " ".join(f"--eos_token_id {i}" for i in (trained_end, *end_ids))
        print(
            f"warning: texts were trained to end on {trained_end}, which is not among the end ids, "
            f"so they may run on to --eval_len; for both give {both}",
            file=sys.stderr,
        )
    names = SearchSettings.__dataclass_fields__.keys() - {"end_ids"}
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        return SearchSettings(end_ids=tuple(dict.fromkeys(end_ids)), **given)
    except ValueError as error:
        raise InputError(f"--{error}") from error


def cut_contexts(
    args: argparse.Namespace, runtime: Runtime, rows: Rows, window: int
) -> list[Context]:
    """The context of each row as token ids; those too long lose their head, and are counted."""
    seq_len = args.seq_len or window
    if seq_len > window:
        raise InputError(f"--seq_len {seq_len} is above the model's {window}")
    if args.eval_len >= seq_len:
        raise InputError(
            f"--eval_len {args.eval_len} leaves no room for a context in --seq_len {seq_len}"
        )
    most = seq_len - args.eval_len
    cut = int((rows.lengths[:, 0] > most).sum())
    if cut and runtime.rank == 0:
        print(
            f"{cut} of {len(rows)} contexts are longer than --seq_len {seq_len} less --eval_len "
            f"{args.eval_len}; only their last {most} tokens count"
        )
    return [tuple(row.context[-most:].tolist()) for row in rows]


def search_contexts(
    args: argparse.Namespace,
    runtime: Runtime,
    model: GPT2LMModel,
    contexts: list[Context],
    settings: SearchSettings,
) -> dict[Context, list[Hypothesis]]:
    """The hypotheses of each distinct context, searched by all processes together.

    Whole batches go to a process, so that each is the same whatever the number of processes.
    """
    distinct = sorted(dict.fromkeys(contexts), key=len, reverse=True)
    starts = range(0, len(distinct), args.batch_size)[runtime.rank :: runtime.world_size]
    mine = [context for i in starts for context in distinct[i : i + args.batch_size]]
    prompts = [torch.tensor(context, device=runtime.device) for context in mine]
    hide = runtime.rank > 0 or not sys.stderr.isatty()
    bar = tqdm(total=len(mine), unit=" texts", bar_format=BAR, disable=hide)
    with bar, runtime.autocast():
        try:
            found = beam_search(
                model, prompts, settings, args.batch_size, args.num_return_sequences, bar.update
            )
        except ValueError as error:
            raise InputError(f"--init_checkpoint or --adapter: {error}") from error
    parts = runtime.gather(dict(zip(mine, found, strict=True)))
    return {context: hypotheses for part in parts for context, hypotheses in part.items()}


def describe(hypothesis: Hypothesis, tokenizer: Tokenizer | None) -> dict:
    """A hypothesis as it stands in the predictions file."""
    tokens = hypothesis.tokens
    fields: dict = {"prediction": tokens}
    if tokenizer is not None:
        words = tokens[:-1] if hypothesis.finished else tokens
        fields["text"] = tokenizer.decode(words, skip_special_tokens=False).strip()
    score = round(hypothesis.score, 4) if tokens else None
    return fields | {"score": score, "length": len(tokens), "finished": hypothesis.finished}


def write_predictions(
    args: argparse.Namespace,
    rows: Rows,
    found: list[list[Hypothesis]],
    tokenizer: Tokenizer | None,
) -> None:
    """One JSON object a row, in the order of the data, with its context as it is there."""
    with replacing(args.output_file) as file:
        for number, context in enumerate(rows.contexts):
            best = [describe(hypothesis, tokenizer) for hypothesis in found[number]]
            prediction = {"id": number, "context": context} | best[0]
            if args.num_return_sequences > 1:
                prediction["n_best"] = best
            file.write(json.dumps(prediction, ensure_ascii=False) + "\n")


def decode(args: argparse.Namespace, runtime: Runtime) -> None:
    """Load, search, write, and say what came out."""
    if args.uses_sample and runtime.rank == 0:
        print(
            "Neither --data nor --init_checkpoint given: decoding the shipped sample with the "
            "shipped nano base. For your own: --data FILE --vocab FOLDER --init_checkpoint FILE"
        )
    tokenizer = load_tokenizer(args.vocab) if args.vocab else None
    if not args.init_checkpoint:
        raise InputError("--init_checkpoint is missing: an adapter means nothing without its base")
    base = checkpoints.read_base(args.init_checkpoint)
    rows = read_data(args, runtime, tokenizer, base)
    tasks = tasks_of_rows(args, rows)
    best: list[list[Hypothesis]] = [[]] * len(tasks)
    searches, seconds = 0, 0.0
    for task in dict.fromkeys(tasks):
        model, header = checkpoints.load(
            base,
            args.adapters[task],
            runtime.device,
            allow_other_base=args.allow_other_base,
            lora_alpha=args.lora_alpha,
            lora_dim=args.lora_dim,
            model_card=args.model_card,
        )
        if tokenizer is not None:
            check_vocabulary(args, tokenizer, model, header)
        settings = search_settings(args, runtime, tokenizer, model.config.vocab_size)
        contexts = cut_contexts(args, runtime, rows, model.config.n_positions)
        if runtime.precision == "fp32":
            pack(model)
        else:
            checkpoints.merge(model)
        numbers = [number for number, name in enumerate(tasks) if name == task]
        started = time.perf_counter()
        found = search_contexts(
            args, runtime, model, [contexts[number] for number in numbers], settings
        )
        seconds += time.perf_counter() - started
        searches += len(found)
        for number in numbers:
            best[number] = found[contexts[number]]
    if runtime.rank == 0:
        write_predictions(args, rows, best, tokenizer)
        unfinished = sum(not hypotheses[0].finished for hypotheses in best)
        print(
            f"{len(best):,} rows, {searches:,} distinct contexts, "
            f"{searches / seconds:.2f} texts/s, {unfinished:,} unfinished at --eval_len "
            f"{args.eval_len}; into {args.output_file}"
        )


def main(argv: list[str] | None = None) -> None:
    """Run the program with the given or the command line's arguments."""
    args = parse_args(argv)
    runtime = gpu.parse_gpu(args)
    try:
        with naming_lost_ranks("start it again"):
            decode(args, runtime)
    finally:
        gpu.cleanup(runtime)


if __name__ == "__main__":
    run_program(main)
