"""Decode with GPT-2 and a LoRA adapter: adapter + data or prompts -> texts.

    python gpt2_beam.py --adapter runs/e2e --prompt "name : Blue Spice | food : Chinese"
    python gpt2_beam.py --adapter runs/e2e          asks for prompts; without a terminal it decodes
                                                    the shipped sample
    python gpt2_beam.py --data test.jsonl --adapter runs/e2e \\
        --output_file runs/e2e/predictions.jsonl    base and vocabulary are those of the run
    python gpt2_beam.py --data test.jsonl --vocab vocab --init_checkpoint gpt2-medium \\
        --adapter e2e=e2e.safetensors --adapter webnlg=runs/webnlg:last ...
                                                    each row by the adapter that its `task` names
    torchrun --nproc_per_node 4 gpt2_beam.py ...    the same file, by four processes

The predictions file has one object for each row of the data, in its order: id, context, prediction
(token ids, the end id included), text (where the vocabulary is known), score, length, finished.
Each distinct context is decoded once. Defaults are the published E2E settings; --do_sample draws
texts at random.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

import checkpoints
import gpu
from checkpoints import AdapterHeader, BaseWeights
from checkpoints.base import fingerprint
from common.errors import InputError, Parser
from common.errors import run as run_program
from common.files import check_output
from common.process_group import naming_lost_ranks
from common.text_files import check_shareable
from data.fields import add_fields_flag
from data_utils import Rows, default_end_ids, load_tokenizer, read_rows, repeats_ngram
from decoding import SearchSettings
from decoding.batches import Batch, Context, decode_batches, make_batches, tasks_of_rows
from decoding.generate import SAMPLING, SEARCH, Settings, make_settings
from decoding.journal import Journal, remove_kept_files
from decoding.packed import pack
from decoding.predictions import write_predictions
from decoding.prompts import Choices, Session, converse
from decoding.sources import Sources, Task, choose_sources
from gpu import Runtime
from model import MODEL_CARDS, GPT2LMModel

NGRAM_SIZE = SearchSettings.no_repeat_ngram_size


def build_parser() -> argparse.ArgumentParser:
    """Return a parser of every flag, with the published E2E settings as defaults."""
    parser = Parser(
        usage="%(prog)s [flags]; --help lists them",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu.add_gpu_params(parser)
    add = parser.add_argument_group("data").add_argument
    add("--data", help="JSONL, JSON, CSV or TSV with a context in each row (docs/data.md)")
    add_fields_flag(add)
    add("--prompt", action="append", help="a context in place of --data; may be repeated")
    add("--vocab", help="folder of the vocabulary (default: the run's); needed for text")
    add("--seq_len", type=int, help="room for context and output (default: the model's window)")
    add("--batch_size", type=int, default=16, help="contexts decoded at once; no effect on texts")
    add = parser.add_argument_group("model").add_argument
    add("--init_checkpoint", help="base: file, folder or gpt2[-medium …] (default: the run's)")
    add(
        "--adapter",
        action="append",
        help="adapter file, PEFT folder, or a training's work_dir: its best on validation, or the "
        "last. RUN:best, RUN:last and RUN:STEP choose. NAME=FILE, repeated, for rows that say "
        "their `task`; null is the base",
    )
    add("--with_base", action="store_true", help="let the base answer prompts too")
    add("--allow_other_base", action="store_true", help="accept a base that is not the adapter's")
    add("--model_card", help=f"{', '.join(MODEL_CARDS)} (default: the adapter's or the base's)")
    add("--lora_dim", type=int, help="default: the adapter's")
    add("--lora_alpha", type=float, help="default: the adapter's; the original's files lack it")
    add = parser.add_argument_group("text").add_argument
    ngram_size = f"0 to allow all (default: {NGRAM_SIZE}, with --do_sample 0)"
    add("--no_repeat_ngram_size", type=int, help=ngram_size)
    add("--repetition_penalty", type=float, help="1 for none (default: 1)")
    add("--min_length", type=int, help="in generated tokens (default: 0)")
    add("--eval_len", type=int, help="most generated tokens (default: 64)")
    add(
        "--eos_token_id",
        type=int,
        action="append",
        help="id that ends a text, may be repeated (default: end-of-text and the blank line)",
    )
    add("--num_return_sequences", type=int, default=1, help="more than 1 adds the n_best field")
    add = parser.add_argument_group("search").add_argument
    add("--search", choices=("original", "hf"), help="hf: as transformers (default: original)")
    add("--beam", type=int, help="default: 10")
    add("--length_penalty", type=float, help="larger favours longer (default: 0.8)")
    add = parser.add_argument_group("sampling").add_argument
    add("--do_sample", action="store_true", help="draw texts at random in place of the search")
    add("--temperature", type=float, help="below 1 favours the likelier tokens (default: 1)")
    add("--top_k", type=int, help="draw from the k likeliest tokens (default: 0, from all)")
    add("--top_p", type=float, help="from the likeliest that reach probability p (default: 1)")
    add("--seed", type=int, dest="random_seed", help="the same as --random_seed")
    add = parser.add_argument_group("output").add_argument
    add("--work_dir", help="folder that --output_file is relative to")
    add("--output_file", help="default: predictions.jsonl in --work_dir, or in runs")
    add("--resume", action="store_true", help="continue the decode into this file that was stopped")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the flags; raise InputError for one that is out of its range."""
    args = build_parser().parse_args(argv)
    if args.batch_size < 1:
        raise InputError(f"--batch_size {args.batch_size} must be at least 1")
    given_settings(args)
    for name in ("data", "fields", "output_file", "work_dir", "resume"):
        if args.prompt is not None and getattr(args, name):
            raise InputError(f"--{name} is for data, which --prompt takes the place of; give one")
    if args.with_base and not args.adapter:
        raise InputError("--with_base sets the base beside an adapter; give --adapter")
    return args


def given_settings(args: argparse.Namespace) -> Settings:
    """Return the settings that the flags give, all but the end ids; raise InputError for those that
    are out of range or contradict one another."""
    given = {name: getattr(args, name, None) for name in sorted(SEARCH | SAMPLING)}
    if args.do_sample:
        given["seed"] = args.random_seed
    try:
        given = {name: value for name, value in given.items() if value is not None}
        settings = make_settings(args.do_sample, **given)
        settings.check_count(args.num_return_sequences)
        return settings
    except ValueError as error:
        raise InputError(f"--{error}") from error


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read, or the base alone."""

    source: str
    header: AdapterHeader | None
    tensors: Mapping[str, Tensor]

    @property
    def virtual_tokens(self) -> int:
        """The length of its prefix, which takes positions from the texts."""
        return self.header.virtual_tokens if self.header else 0


@dataclass(frozen=True)
class Job:
    """A decode whose files are read and checked: what is left is the search."""

    tokenizer: Tokenizer | None
    base: BaseWeights
    adapters: Mapping[Task, Adapter]
    settings: Settings
    rows: Rows
    tasks: list[Task]
    contexts: list[Context]


def read_job(args: argparse.Namespace, runtime: Runtime, sources: Sources) -> Job:
    """Read all that a decode needs, each file once; raise InputError for what does not fit."""
    tokenizer = load_tokenizer(sources.vocab) if sources.vocab else None
    base = checkpoints.read_base(sources.init_checkpoint)
    adapters = {}
    for task, found in sources.adapters.items():
        header, tensors = checkpoints.read_adapter(found.path, base) if found else (None, {})
        adapters[task] = Adapter(str(found and found.path), header, tensors)
        if tokenizer is not None:
            checkpoints.check_vocabulary(tokenizer, str(sources.vocab), base, header)
    settings = replace(
        given_settings(args), end_ids=choose_end_ids(args, runtime, tokenizer, base.vocab_size)
    )
    also = ["task"] if len(adapters) > 1 else []
    check_shareable(sources.data, runtime.world_size)
    rows = read_rows(sources.data, tokenizer, base.vocab_size, False, args.fields, also)
    if runtime.rank == 0:
        print(f"{sources.data}: {len(rows):,} rows ({rows.source})")
        warn_of_ends(rows, settings)
        if args.no_repeat_ngram_size is None and settings.no_repeat_ngram_size:
            warn_of_repeats(rows)
    tasks = tasks_of_rows(rows, adapters)
    windows = {
        task: choose_window(args, base.n_positions, adapter.virtual_tokens)
        for task, adapter in adapters.items()
    }
    contexts = cut_contexts(runtime, rows, [windows[task] for task in tasks], settings.eval_len)
    return Job(tokenizer, base, adapters, settings, rows, tasks, contexts)


def choose_end_ids(
    args: argparse.Namespace, runtime: Runtime, tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[int, ...]:
    """Return the ids that end a text; warn where texts may not find their end.

    Raises:
        InputError: they are not known, or not in the vocabulary.
    """
    defaults = default_end_ids(tokenizer, vocab_size)
    end_ids = args.eos_token_id or defaults
    if not end_ids:
        raise InputError(
            f"the end ids of a vocabulary of {vocab_size} entries are not known; give --vocab, or "
            "--eos_token_id"
        )
    if outside := [i for i in end_ids if not 0 <= i < vocab_size]:
        raise InputError(f"--eos_token_id {outside[0]} is not a token id below {vocab_size}")
    if defaults and defaults[0] not in end_ids and runtime.rank == 0:
        both = " ".join(f"--eos_token_id {i}" for i in (defaults[0], *end_ids))
        warn(
            f"texts were trained to end on {defaults[0]}, which is not among the end ids, so they "
            f"may run on to --eval_len; for both give {both}"
        )
    return tuple(dict.fromkeys(end_ids))


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def warn_of_ends(rows: Rows, settings: Settings) -> None:
    """Warn where the data's own completions continue after an end id, as no output can."""
    inner = [row.completion[:-1] for row in rows]
    longer = sum(bool(np.isin(tokens, settings.end_ids).any()) for tokens in inner)
    if longer:
        first = settings.end_ids[0]
        warn(
            f"{longer} of {len(rows)} completions in the data hold an end id before their last "
            f"token, where an output would end; --eos_token_id {first} alone keeps the others"
        )


def warn_of_repeats(rows: Rows) -> None:
    """Warn of completions that the default ban of n-grams would not let be written."""
    banned = sum(repeats_ngram(row.completion.tolist(), NGRAM_SIZE) for row in rows)
    if banned:
        warn(
            f"{banned:,} completions of the data repeat {NGRAM_SIZE} tokens in a row, which "
            "decoding will not; --no_repeat_ngram_size 0 allows it"
        )


def choose_window(args: argparse.Namespace, n_positions: int, virtual_tokens: int = 0) -> int:
    """Return how many tokens there may be of a context and its text, after a prefix."""
    checkpoints.check_window(args.seq_len or 0, n_positions, virtual_tokens)
    return args.seq_len or n_positions - virtual_tokens


def cut_contexts(
    runtime: Runtime, rows: Rows, windows: Sequence[int], eval_len: int
) -> list[Context]:
    """Return each row's context; those too long for its window lose their head, and are counted."""
    window = min(windows)
    checkpoints.check_room("eval_len", eval_len, window)
    rooms = np.array(windows) - eval_len
    cut = int((rows.lengths[:, 0] > rooms).sum())
    if cut and runtime.rank == 0:
        print(
            f"{cut} of {len(rows)} contexts are longer than --seq_len {window} less --eval_len "
            f"{eval_len}; only their last {window - eval_len} tokens count"
        )
    return [tuple(row.context[-room:].tolist()) for row, room in zip(rows, rooms, strict=True)]


def load_model(args: argparse.Namespace, runtime: Runtime, job: Job, task: Task) -> GPT2LMModel:
    """Return the model of a task, merged and prepared once for its precision."""
    adapter = job.adapters[task]
    model = checkpoints.assemble(
        job.base, adapter.header, adapter.tensors, adapter.source, **adapter_flags(args)
    ).to(runtime.device)
    return pack(model, runtime.precision)


def adapter_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags say about an adapter and its base."""
    names = ("allow_other_base", "lora_dim", "lora_alpha", "model_card")
    return {name: getattr(args, name) for name in names}


def identify(
    args: argparse.Namespace, runtime: Runtime, job: Job, batches: Sequence[Batch]
) -> dict[str, Any]:
    """Return what decides the result: a decode that was stopped is resumed under the same alone."""
    data = json.dumps([[batch.task, batch.contexts, batch.rows] for batch in batches])
    return {
        "--data, --seq_len or --batch_size": hashlib.sha256(data.encode()).hexdigest(),
        "--init_checkpoint": job.base.fingerprint,
        "--adapter": {
            str(task): [adapter.header and adapter.header.to_json(), fingerprint(adapter.tensors)]
            for task, adapter in job.adapters.items()
        },
        "setting of the decoding": asdict(job.settings),
        "--num_return_sequences": args.num_return_sequences,
        "precision or device": [runtime.precision, runtime.device.type],
        "--lora_alpha": args.lora_alpha,
    }


def decode(args: argparse.Namespace, runtime: Runtime) -> None:
    """Search what the flags ask for, write it, and say what came out."""
    sources = choose_sources(args.data, args.init_checkpoint, args.vocab, args.adapter)
    folder = args.work_dir or ("" if args.output_file else "runs")
    output = Path(folder) / (args.output_file or "predictions.jsonl")
    check_output("--output_file", output, sources.files())
    if runtime.rank == 0:
        sources.announce()
    job = read_job(args, runtime, sources)
    batches = make_batches(job.tasks, job.contexts, args.batch_size)
    if runtime.rank == 0 and not args.resume:
        remove_kept_files(output)
    runtime.barrier()
    journal = Journal(output, identify(args, runtime, job, batches), args.resume)
    kept = sum(len(batches[number].contexts) for number in journal.found)
    started = time.perf_counter()
    try:
        load = partial(load_model, args, runtime, job)
        count = args.num_return_sequences
        found = decode_batches(runtime, batches, load, job.settings, count, journal)
    except ValueError as error:
        raise InputError(f"--init_checkpoint or --adapter: {error}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command with --resume continues") from None
    finally:
        journal.close()
    seconds = time.perf_counter() - started
    if runtime.rank:
        return
    best = [found[place] for place in zip(job.tasks, job.contexts, strict=True)]
    write_predictions(output, job.rows.contexts, best, job.tokenizer, count > 1)
    remove_kept_files(output)
    unfinished = sum(not hypotheses[0].finished for hypotheses in best)
    print(
        f"{len(best):,} rows, {len(found):,} distinct contexts"
        f"{f', {kept:,} of them kept from before' if kept else ''}, "
        f"{(len(found) - kept) / seconds:.2f} texts/s, {unfinished:,} unfinished at --eval_len "
        f"{job.settings.eval_len}; into {output}"
    )


def takes_prompts(args: argparse.Namespace, runtime: Runtime) -> bool:
    """Whether prompts take the place of data: those of the flags or, where nothing names data or a
    file for the output, those typed at a terminal.

    Raises:
        InputError: a flag does not go with this.
    """
    if args.prompt is not None and runtime.world_size > 1:
        raise InputError("--prompt is answered by one process; start it without torchrun")
    for_data = args.data or args.output_file or args.work_dir or args.resume
    at_terminal = runtime.world_size == 1 and sys.stdin is not None and sys.stdin.isatty()
    if args.prompt is not None or (at_terminal and not for_data):
        return True
    if args.with_base:
        raise InputError("--with_base is for prompts; for data decode once more without --adapter")
    return False


def answer_prompts(args: argparse.Namespace, runtime: Runtime) -> None:
    """Answer the prompts given or, without any, those that are typed."""
    with redirect_stdout(sys.stderr):
        session = open_session(args, runtime)
    if args.prompt is not None:
        session.answer(args.prompt)
    else:
        converse(session)


def open_session(args: argparse.Namespace, runtime: Runtime) -> Session:
    """Return the models and settings that the flags name, ready to answer."""
    sources = choose_sources(None, args.init_checkpoint, args.vocab, args.adapter, prompts=True)
    if sources.vocab is None:
        raise InputError("--vocab is missing; a prompt is text, which needs a vocabulary")
    sources.announce()
    tokenizer, vocab = load_tokenizer(sources.vocab), sources.vocab
    base = checkpoints.read_base(sources.init_checkpoint)
    weights = {name: t.to(runtime.device, torch.float32) for name, t in base.tensors.items()}

    @cache
    def load(adapter: Path | None) -> GPT2LMModel:
        model, header = checkpoints.load(base, adapter, runtime.device, **adapter_flags(args))
        checkpoints.check_vocabulary(tokenizer, vocab, base, header)
        checkpoints.share_weights(model, weights)
        return model

    end_ids = choose_end_ids(args, runtime, tokenizer, base.vocab_size)
    settings = replace(given_settings(args), end_ids=end_ids)
    found = {name or args.adapter[0]: at.path for name, at in sources.adapters.items() if at}
    return Session(
        load,
        found,
        tokenizer,
        runtime,
        choose_window(args, base.n_positions),
        Choices.of(settings, args.num_return_sequences),
        args.with_base,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the program with the given or the command line's arguments."""
    args = parse_args(argv)
    runtime = gpu.parse_gpu(args)
    try:
        if takes_prompts(args, runtime):
            answer_prompts(args, runtime)
        else:
            with naming_lost_ranks("the same command with --resume continues"):
                decode(args, runtime)
    finally:
        gpu.cleanup(runtime)


if __name__ == "__main__":
    run_program(main)
