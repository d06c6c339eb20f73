"""Training speed of this repository, transformers + peft, trl and the original, on one data set.

    python -m benchmarks.train                   gpt2.sm;  --size small: 4 layers, 256 wide
    LORA_ORIGINAL=LoRA/examples/NLG/src python -m benchmarks.train      the original code too

First, without dropout, the losses of all peers must agree step by step, those of trl with ours
without label smoothing; then they are timed with dropout 0.1. trl runs in the environment
`.venv-peers`, which is made at the first run. The result goes to results/bench/, from where
experiments/tables.py makes the tables.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import common
from common.errors import Parser
from common.errors import run as run_program
from data_utils import EpochSampler, FT_Dataset

SFT = ("sft", "sft-padding-free")  # trl's SFTTrainer, whose default loss has no label smoothing
PEERS = ("peft-sdpa", "peft-eager", "peft-select", *SFT)
TOLERANCE = 1e-5
# Seconds of the original over the better peft, from an earlier run of all peers on such a CPU.
ORIGINAL_OVER_PEFT = 10.2


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", choices=common.SIZES, default="sm", help="default: %(default)s")
    add("--peers", nargs="+", choices=PEERS, default=PEERS, help="default: all")
    add("--rounds", type=int, default=7, help="in which every peer has its turn (default: 7)")
    add("--steps", type=int, default=2, help="per peer and round (default: %(default)s)")
    add("--gate_steps", type=int, default=50, help="whose losses are compared (default: 50)")
    add("--batch", type=int, default=8, help="rows per step (default: %(default)s)")
    add("--rank", type=int, default=4, help="default: %(default)s")
    add("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    add("--name", help="of the result file (default: train-SIZE)")
    return parser.parse_args(argv)


def write_adapter(shape: dict[str, int], rank: int, path: Path) -> None:
    """The adapter that all peers start from; B away from zero, so that A has gradients too."""
    torch.manual_seed(1)
    width, tensors = shape["n_embd"], {}
    for i in range(shape["n_layer"]):
        name = f"transformer.h.{i}.attn.c_attn.lora_"
        tensors[name + "A"] = torch.randn(2 * rank, width) / width**0.5
        tensors[name + "B"] = 0.01 * torch.randn(2 * width, rank)
    save_file(tensors, path)


def needed_flop(shape: dict[str, int], data: FT_Dataset, rows: list[int]) -> float:
    """The operations of the matrix products that a step needs: forward and gradient by the input,
    real tokens only (after the last attention those in the loss), none before the first adapter."""
    items = [data[row] for row in rows]
    counted = sum(int(item["mask"].sum()) for item in items)
    real = sum(int(item["mask"].nonzero()[0][-1]) + 1 for item in items)
    width, layers = shape["n_embd"], shape["n_layer"]
    attention, after = 3 * width**2, 9 * width**2
    weights = real * (layers * attention + (layers - 1) * after)
    weights += counted * (after + width * shape["vocab_size"])
    return 2 * (2 * weights - real * attention)


def start_peer(name: str, settings: Path, threads: int) -> common.Peer:
    """A peer in a process of its own, and in the environment that it needs."""
    if name in SFT:
        python = common.peers_python()
        return common.Peer("benchmarks.sft_peers", name, settings, threads, python)
    return common.Peer("benchmarks.train_peers", name, settings, threads)


def check_losses(names: list[str], settings: dict, folder: Path, batches: list) -> dict[str, float]:
    """Largest difference of each peer's losses from ours, without dropout; ends the run above
    `TOLERANCE`."""
    path = folder / "gate.json"

    def losses_of(name: str, label_smooth: float) -> list[float]:
        own = {"dropout": 0.0, "label_smooth": label_smooth}
        path.write_text(json.dumps(settings | own), encoding="utf-8")
        with start_peer(name, path, settings["threads"]) as peer:
            return peer.ask(batches)["losses"]

    smoothing = {name: 0.0 if name in SFT else settings["label_smooth"] for name in names[1:]}
    ours = {value: losses_of("ours", value) for value in set(smoothing.values())}
    errors = {
        name: max(abs(a - b) for a, b in zip(ours[value], losses_of(name, value), strict=True))
        for name, value in smoothing.items()
    }
    print(f"largest difference of {len(batches)} losses from ours: {errors}")
    # The original divides by Σ mask + 1e-4, which alone is a difference of a few 1e-6.
    if max(errors.values()) > TOLERANCE:
        sys.exit("the losses differ: what follows would compare different things")
    return errors


def time_peers(names: list[str], settings: dict, folder: Path, batches: list) -> dict:
    """Seconds of each step of each peer, GFLOP/s of each round, and peak memory."""
    path = folder / "timing.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks, rss = [], {}
    rounds, steps = settings["rounds"], settings["steps"]
    with ExitStack() as stack:
        peers = {
            name: stack.enter_context(start_peer(name, path, settings["threads"]))
            for name in (*names, "gemm")
        }
        for name in names:
            peers[name].ask(batches[:2])  # warm-up
        for number in range(rounds):
            mine = batches[number * steps : (number + 1) * steps]
            peaks.append(peers["gemm"].ask([])["gflops"])
            for name in names:
                answer = peers[name].ask(mine)
                seconds[name] += answer["seconds"]
                rss[name] = answer["rss"]
            print(f"round {number + 1}: " + ", ".join(f"{n} {seconds[n][-1]:.2f} s" for n in names))
    return {"seconds": seconds, "gflops": peaks, "rss": rss}


def compare(timing: dict, flop: list[float], tokens: list[int], batch: int) -> dict:
    """What the tables show: per peer its figures, and ours against each."""
    seconds, peak = timing["seconds"], max(timing["gflops"])
    peers = {
        name: {
            "seconds": common.summary(times),
            "samples_per_second": batch / statistics.median(times),
            "tokens_per_second": sum(tokens) / sum(times),
            "percent_of_gemm_peak": 100e-9 * sum(flop) / sum(times) / peak,
            "rss_mb": timing["rss"][name],
        }
        for name, times in seconds.items()
    }
    faster = {
        name: common.ratios(times, seconds["ours"])
        for name, times in seconds.items()
        if name != "ours"
    }
    plain = [faster[name]["median"] for name in ("peft-sdpa", "peft-eager") if name in faster]
    if plain and "original" not in faster:
        faster["original, derived"] = {"median": min(plain) * ORIGINAL_OVER_PEFT}
    return {"gemm_gflops": common.summary(timing["gflops"]), "peers": peers, "ours_faster": faster}


def main(argv: list[str] | None = None) -> None:
    """Gate, timing, result file."""
    args = parse_args(argv)
    names = ["ours", *args.peers]
    if os.environ.get("LORA_ORIGINAL"):
        names.append("original")
    shape = common.model_shape(args.size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source, data_path = common.read_samples("valid", folder)
        common.write_random_base(args.size, folder / "base.safetensors")
        write_adapter(shape, args.rank, folder / "adapter.safetensors")
        settings = vars(args) | {
            "data": str(data_path), "base": str(folder / "base.safetensors"), "alpha": 32,
            "adapter": str(folder / "adapter.safetensors"), "card": common.SIZES[args.size],
            "shape": shape, "dropout": 0.1, "label_smooth": 0.1, "lr": 2e-4,
        }  # fmt: skip
        data = FT_Dataset(data_path, 512)
        sampler = EpochSampler(len(data), args.batch, seed=110)
        steps = (rows for epoch in range(1, 9) for (rows,) in sampler.steps(epoch))
        batches = [rows for rows in steps if len(rows) == args.batch]
        timed = batches[: args.rounds * args.steps]
        gate = {
            "tolerance": TOLERANCE,
            "steps": args.gate_steps,
            "errors": check_losses(names, settings, folder, batches[: args.gate_steps]),
        }
        timing = time_peers(names, settings, folder, timed)
    flop = [needed_flop(shape, data, rows) for rows in timed]
    tokens = [int(sum(data.lengths[row] for row in rows)) for rows in timed]
    result = {
        "benchmark": "train", "size": args.size, "rows": source, "batch": args.batch,
        "rank": args.rank, "steps": len(timed), "machine": common.machine(args.threads),
        "gate": gate, **compare(timing, flop, tokens, args.batch), "raw": timing,
    }  # fmt: skip
    if {*SFT} & {*names}:
        result["versions"] = common.peers_versions()
    for name, ratio in result["ours_faster"].items():
        print(f"ours over {name}: {ratio['median']:.2f}")
    print(common.write_result(args.name or f"train-{args.size}", result))


if __name__ == "__main__":
    run_program(main)
