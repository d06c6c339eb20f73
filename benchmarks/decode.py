"""Decoding speed compared with transformers' generate, on the same contexts, in one run.

    python -m benchmarks.decode                     gpt2.sm with random weights: all 64 steps
    python -m benchmarks.decode --size small        4 layers, 256 wide, trained here: texts end

In each round all sequences of `--search hf` must equal transformers'; that those of `--search
original` equal the original code's is a test, tests/test_oracles.py. The contexts are E2E's where
DATA_DIR names the raw files, else the shipped sample's. The result goes to results/bench/.
"""

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file

import gpt2_ft
from benchmarks import common
from benchmarks.train_peers import start_run
from common.errors import Parser
from common.errors import run as run_program
from common.files import read_json_lines

NAMES = ("ours", "ours-hf", "transformers")
RULES = {
    "beam": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4, "eval_len": 64,
    "end_ids": [50256, 628],
}  # fmt: skip
# Seconds per context of the original, which takes one at a time, over those of transformers, from a
# run of both on this kind of CPU: random gpt2.sm, and a small trained model.
ORIGINAL_OVER_TRANSFORMERS = {
    "sm": {"one": 50.1 / 10.3, "batch": 50.1 / 5.4},
    "small": {"one": 7.25 / 1.11, "batch": 7.25 / 0.62},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", choices=common.SIZES, default="sm", help="default: %(default)s")
    add("--rounds", type=int, default=3, help="in which every peer has its turn (default: 3)")
    add("--contexts", type=int, default=16, help="distinct ones per round (default: %(default)s)")
    add("--batch", type=int, default=8, help="contexts at once (default: %(default)s)")
    add("--beam", type=int, default=10, help="default: %(default)s")
    add("--eval_len", type=int, default=64, help="most generated tokens (default: %(default)s)")
    add("--train_steps", type=int, default=400, help="of the small model (default: 400)")
    add("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    add("--name", help="of the result file (default: decode-SIZE-BATCH)")
    return parser.parse_args(argv)


def write_trained_base(size: str, count: int, path: Path) -> None:
    """A model of random weights, all of them trained for this many steps."""
    common.write_random_base(size, path)
    _, rows = common.read_samples("valid", path.parent)
    run = start_run(
        path.parent, train_data=rows, init_checkpoint=path, model_card=common.SIZES[size],
        lora_dim=0, lr=1e-3, max_step=count, warmup_step=min(20, count - 1),
    )  # fmt: skip
    steps = (batch for epoch in range(1, 99) for batch in run.sampler.steps(epoch))
    for _, batch in zip(range(count), steps, strict=False):
        loss = gpt2_ft.optimizer_step(run, batch).loss
    print(f"the small model's last loss: {loss:.3f}")
    save_file(run.model.state_dict(), path)


def time_peers(settings: dict, path: Path, contexts: list[list[int]]) -> dict:
    """Seconds per context of each peer and round, sequences that differ, and peak memory."""
    count, rss, differ, peaks = settings["contexts"], {}, 0, []
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    with ExitStack() as stack:
        peers = {
            name: stack.enter_context(
                common.Peer("benchmarks.decode_peers", name, path, settings["threads"])
            )
            for name in (*NAMES, "gemm")
        }
        for name in NAMES:
            peers[name].ask(contexts[:1])  # warm-up
        for number in range(settings["rounds"]):
            mine = contexts[number * count : (number + 1) * count]
            peaks.append(peers["gemm"].ask([])["gflops"])
            answers = {name: peers[name].ask(mine) for name in NAMES}
            for name, answer in answers.items():
                seconds[name].append(answer["seconds"] / len(mine))
                rss[name] = answer["rss"]
            pairs = zip(
                answers["ours-hf"]["outputs"], answers["transformers"]["outputs"], strict=True
            )
            differ += sum(a != b for a, b in pairs)
            times = ", ".join(f"{name} {seconds[name][-1]:.2f} s" for name in NAMES)
            print(f"round {number + 1}: {times} per context; {differ} sequences differ")
    return {"seconds": seconds, "gflops": peaks, "rss": rss, "differ": differ}


def compare(timing: dict, size: str, batch: int, repeats: float) -> dict:
    """What the tables show; what is against the original is derived."""
    seconds = timing["seconds"]
    faster = {"transformers": common.ratios(seconds["transformers"], seconds["ours"])}
    faster["transformers, --search hf"] = common.ratios(seconds["transformers"], seconds["ours-hf"])
    original = ORIGINAL_OVER_TRANSFORMERS[size]["one" if batch == 1 else "batch"]
    derived = faster["transformers"]["median"] * original
    faster["original at batch 1, derived"] = {"median": derived}
    faster["original, the whole file, derived"] = {"median": derived * repeats}
    peers = {
        name: {"seconds": common.summary(times), "rss_mb": timing["rss"][name]}
        for name, times in seconds.items()
    }
    return {"gemm_gflops": common.summary(timing["gflops"]), "peers": peers, "ours_faster": faster}


def main(argv: list[str] | None = None) -> None:
    """Gate, timing with a gate of its own, result file."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = folder / "base.safetensors"
        if args.size == "small":
            write_trained_base(args.size, args.train_steps, base)
        else:
            common.write_random_base(args.size, base)
        source, test = common.read_samples("test", folder)
        rows = [tuple(row["context"]) for row in read_json_lines(test)]
        distinct = list(dict.fromkeys(rows))
        contexts = [list(row) for row in distinct[:: max(1, len(distinct) // 97)]]
        settings = vars(args) | {
            "shape": common.model_shape(args.size),
            "base": str(base),
            "rules": RULES | {"beam": args.beam, "eval_len": args.eval_len},
        }
        path = folder / "settings.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        timing = time_peers(settings, path, contexts)
    repeats = len(rows) / len(distinct)
    result = {
        "benchmark": "decode", "size": args.size, "rows": source, "batch": args.batch,
        "rules": settings["rules"], "contexts": args.rounds * args.contexts,
        "rows_per_context": repeats, "machine": common.machine(args.threads),
        "gate": {"differ_from_transformers": timing["differ"]},
        **compare(timing, args.size, args.batch, repeats), "raw": timing,
    }  # fmt: skip
    for name, ratio in result["ours_faster"].items():
        print(f"ours over {name}: {ratio['median']:.2f}")
    print(common.write_result(args.name or f"decode-{args.size}-{args.batch}", result))
    if timing["differ"]:
        sys.exit(f"{timing['differ']} sequences differ from transformers'")


if __name__ == "__main__":
    run_program(main)
