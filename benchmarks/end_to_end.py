"""Seconds from raw files to a table of scores, by this repository's programs and by transformers,
peft and trl.

    python -m benchmarks.end_to_end                 the shipped sample
    DATA_DIR=FOLDER python -m benchmarks.end_to_end --data e2e      E2E, within a budget

Both fine-tune the same adapter (c_attn, without label smoothing) of the shipped mini base for as
many steps, and search the same test inputs by beam 10 with transformers' rules; every program
starts anew, as a user starts it. One scorer, eval/evaluate.py, scores both, as there is no other
that works without a network. The scores must be alike, or the work was not the same. The result
goes to results/bench/, from where experiments/tables.py makes the table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import checkpoints
from benchmarks import common
from checkpoints.export import LoadedAdapter, complete, write_merged
from common.errors import InputError, Parser
from common.errors import run as run_program
from common.files import read_json_lines, replacing, write_json
from data.convert_e2e import e2e_rows
from data.rows import read_text, write_jsonl
from eval.summary import read_scores

BASE = common.ROOT / "data" / "mini"
ALPHA = 32
Commands = dict[str, list[list[str]]]
Rounds = dict[str, list[dict[str, float]]]  # by path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=("sample", "e2e"), default="sample", help="default: %(default)s")
    add("--max_step", type=int, default=300, help="of training (default: %(default)s)")
    add("--contexts", type=int, default=100, help="decoded, at most (default: %(default)s)")
    add("--rounds", type=int, default=2, help="in which either has its turn (default: 2)")
    add("--batch", type=int, default=8, help="rows per step (default: %(default)s)")
    add("--decode_batch", type=int, default=16, help="contexts at once (default: %(default)s)")
    add("--rank", type=int, default=4, help="default: %(default)s")
    add("--lr", type=float, default=1e-2, help="default: %(default)s")
    add("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    add("--name", help="of the result file (default: end-to-end-DATA)")
    return parser.parse_args(argv)


def write_raw_files(data: str, rows: int, contexts: int, folder: Path) -> dict[str, str]:
    """Cut the raw files to a budget of rows to train on and of contexts to decode, both from all
    over their file; and write these as the scorer reads them.

    Raises:
        InputError: E2E is asked for without DATA_DIR, or a file is not there.
    """
    if data == "sample":
        source, end = common.ROOT / "data" / "sample", ".jsonl"
    elif os.environ.get("DATA_DIR"):
        source, end = Path(os.environ["DATA_DIR"]) / "e2e", ".txt"
    else:
        raise InputError("--data e2e reads raw files; name by DATA_DIR the folder that has e2e/")
    train, test = (read_lines(source / (split + end)) for split in ("train", "test"))
    context_of = {line: line.partition("||")[0] for line in test}
    if data == "sample":
        context_of = {line: json.loads(line)["context"] for line in test}
    decoded = {*spaced(list(dict.fromkeys(context_of.values())), contexts)}
    cut = {
        "train": spaced(train, rows),
        "test": [line for line in test if context_of[line] in decoded],
    }
    paths = {f"{split}_data": str(folder / (split + end)) for split in cut}
    for split, lines in cut.items():
        with replacing(folder / (split + end)) as file:
            file.writelines(line + "\n" for line in lines)
    if data == "sample":
        return paths | {"scored_data": paths["test_data"]}
    write_jsonl(folder / "scored.jsonl", e2e_rows(paths["test_data"]))
    return paths | {"scored_data": str(folder / "scored.jsonl")}


def read_lines(path: Path) -> list[str]:
    """The lines of a file, which may be there as .gz alone."""
    return read_text(path if path.exists() else f"{path}.gz").rstrip("\n").split("\n")


def spaced(items: list[str], most: int) -> list[str]:
    """At most `most` of the items, at equal distances."""
    return items[:: -(-len(items) // most)]


def write_base(folder: Path) -> None:
    """The mini base as transformers reads it, with its tokenizer."""
    base = checkpoints.read_base(str(BASE))
    model, _ = checkpoints.load(base)
    header = complete(None, model, base, None)
    write_merged(LoadedAdapter(base, model, header, {}, str(BASE)), folder)


def ours(settings: dict, folder: Path) -> Commands:
    """This repository's programs, part by part."""
    train, test, data = settings["train_data"], settings["test_data"], []
    if train.endswith(".txt"):  # JSON lines are read as they are
        converted = [str(folder / f"{split}.jsonl") for split in ("train", "test")]
        data = [
            [sys.executable, "-m", "data.convert_e2e", raw, target]
            for raw, target in zip((train, test), converted, strict=True)
        ]
        train, test = converted
    flags = {
        "train_data": train, "vocab": BASE, "init_checkpoint": BASE, "lora_targets": "c_attn",
        "lora_dim": settings["rank"], "lora_alpha": ALPHA, "label_smooth": 0, "lr": settings["lr"],
        "optimizer": "torch", "train_batch_size": settings["batch"], "work_dir": folder / "run",
        "max_step": settings["max_step"], "warmup_step": settings["warmup_step"],
        "random_seed": settings["seed"], "device": "cpu",
    }  # fmt: skip
    output = str(folder / "ours.jsonl")
    decode = [
        "--data", test, "--adapter", str(folder / "run"), "--search", "hf", "--device", "cpu",
        "--batch_size", str(settings["decode_batch"]), "--output_file", output,
    ]  # fmt: skip
    return {
        "data": data,
        "training": [
            [sys.executable, "gpt2_ft.py", *(f"--{name}={value}" for name, value in flags.items())]
        ],
        "decoding": [[sys.executable, "gpt2_beam.py", *decode]],
        "scoring": [scoring(settings, output)],
    }


def theirs(settings: dict, folder: Path) -> Commands:
    """The same by transformers, peft and trl, which read raw files themselves."""
    path, predictions = folder / "settings.json", str(folder / "theirs.jsonl")
    own = {"output": str(folder / "adapter"), "predictions": predictions}
    write_json(path, settings | own)
    program = [common.peers_python(), "-m", "benchmarks.end_to_end_peer"]
    return {
        "data": [],
        "training": [[*program, "train", str(path)]],
        "decoding": [[*program, "decode", str(path)]],
        "scoring": [scoring(settings, predictions)],
    }


def scoring(settings: dict, predictions: str) -> list[str]:
    """The command of the official scores, which prints their table."""
    return [
        sys.executable, "-m", "eval.evaluate", "--task", "e2e",
        "--data", settings["scored_data"], "--predictions", predictions,
        "--json", predictions + ".json",
    ]  # fmt: skip


def time_parts(parts: Commands, threads: int) -> dict[str, float]:
    """Seconds of each part, whose commands run one after another, of all, and of the CPU."""
    environment, seconds, before = common.environment(threads), {}, cpu_seconds()
    for part, commands in parts.items():
        started = perf_counter()
        for command in commands:
            output = None if part == "scoring" else subprocess.DEVNULL
            done = subprocess.run(
                command, cwd=common.ROOT, env=environment, stdout=output, check=False
            )
            if done.returncode:
                raise InputError(f"{' '.join(command)} failed; what it printed says why")
        seconds[part] = perf_counter() - started
    return seconds | {"all": sum(seconds.values()), "CPU": cpu_seconds() - before}


def cpu_seconds() -> float:
    """What the processes that were started have taken of the CPU."""
    used = os.times()
    return used.children_user + used.children_system


def compare(timing: Rounds, scores: Rounds) -> dict:
    """What the table shows: seconds and scores of either path, and the ratio of all seconds."""
    paths = {
        name: {"seconds": summaries(timing[name]), "scores": summaries(scores[name])}
        for name in timing
    }
    theirs, ours = ([s["all"] for s in timing[name]] for name in ("transformers", "ours"))
    return {"paths": paths, "ours_faster": {"transformers": common.ratios(theirs, ours)}}


def summaries(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, smallest and largest of each value."""
    return {name: common.summary([values[name] for values in rounds]) for name in rounds[0]}


def run_rounds(settings: dict, folder: Path) -> tuple[dict, dict]:
    """Seconds of the parts and scores of either path in each round, which has a seed of its own."""
    timing: Rounds = {"ours": [], "transformers": []}
    scores: Rounds = {"ours": [], "transformers": []}
    for number in range(1, settings["rounds"] + 1):
        own, place = settings | {"seed": number}, folder / f"round{number}"
        place.mkdir()
        for name, parts in {"ours": ours(own, place), "transformers": theirs(own, place)}.items():
            print(f"== Round {number}, {name}", flush=True)
            seconds = time_parts(parts, settings["threads"])
            print(", ".join(f"{part} {s:.1f} s" for part, s in seconds.items()))
            timing[name].append(seconds)
            found = read_scores(name, parts["scoring"][0][-1])[name]
            # Without Java some scores are null.
            scores[name].append({metric: s for metric, s in found.items() if s is not None})
    return timing, scores


def main(argv: list[str] | None = None) -> None:
    """Rounds of both paths, result file."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_base(folder / "base")
        raw = write_raw_files(args.data, args.max_step * args.batch, args.contexts, folder)
        own = {"warmup_step": args.max_step // 10, "base": str(folder / "base"), "alpha": ALPHA}
        timing, scores = run_rounds(vars(args) | raw | own, folder)
        contexts = {row["context"] for row in read_json_lines(raw["scored_data"])}
    result = {
        "benchmark": "end_to_end", "size": args.data, "batch": args.batch, "steps": args.max_step,
        "rows": f"{args.max_step} steps, {len(contexts)} test inputs", "rounds": args.rounds,
        "lr": args.lr, "rank": args.rank, "machine": common.machine(args.threads),
        "versions": common.peers_versions(), **compare(timing, scores),
        "raw": {"seconds": timing, "scores": scores},
    }  # fmt: skip
    print(f"ours over transformers: {result['ours_faster']['transformers']['median']:.2f}")
    print(common.write_result(args.name or f"end-to-end-{args.data}", result))


if __name__ == "__main__":
    run_program(main)
