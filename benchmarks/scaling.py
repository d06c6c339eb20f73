"""What a training step and a search cost against rows, their length, rank, beams and processes.

    python -m benchmarks.scaling                 a small model;  --size sm: gpt2.sm, takes long

One thing is varied at a time about a middle: 8 rows of 64 tokens, r 4; 8 contexts of 32 tokens,
beam 10, 16 new tokens. All cases take turns. The result goes to results/bench/.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import perf_counter

import torch

import gpu
import loralib as lora
from benchmarks import common
from common.errors import Parser, run
from decoding.beam_search import SearchSettings, beam_search
from decoding.packed import pack
from model import GPT2Config, GPT2LMModel

MIDDLE = {"rows": 8, "tokens": 64, "rank": 4}
TRAINING = {"rows": (1, 2, 4, 8, 16, 32), "tokens": (16, 32, 64, 128, 256, 512),
            "rank": (1, 4, 16, 64, 256)}  # fmt: skip
SEARCH_MIDDLE = {"contexts": 8, "beam": 10}
SEARCH = {"contexts": (1, 2, 4, 8, 16, 32), "beam": (1, 2, 5, 10, 20)}
Case = tuple[str, str, int]


@cache
def adapted_model(size: str, rank: int) -> GPT2LMModel:
    torch.manual_seed(0)
    adapter = lora.LoraConfig(rank, 32, 0.1)
    model = GPT2LMModel(GPT2Config(**common.model_shape(size), lora=adapter)).train()
    lora.mark_only_lora_as_trainable(model)
    return model


@cache
def packed_model(size: str) -> GPT2LMModel:
    torch.manual_seed(0)
    return pack(GPT2LMModel(GPT2Config(**common.model_shape(size))).eval())


def training_step(size: str, rows: int, tokens: int, rank: int) -> Callable[[], object]:
    """Forward and backward of random rows, of which the second half counts, as in E2E."""
    model = adapted_model(size, rank)
    ids = torch.randint(model.config.vocab_size, (rows, tokens + 1))
    mask = torch.zeros(rows, tokens)
    mask[:, tokens // 2 :] = 1
    return lambda: model(ids[:, :-1], ids[:, 1:], mask, 0.1)[1].backward()


def search(size: str, contexts: int, beam: int) -> Callable[[], object]:
    """Random weights: no text ends before its 16 tokens."""
    model = packed_model(size)
    prompts = list(torch.randint(model.config.vocab_size, (contexts, 32)))
    settings = SearchSettings(beam=beam, eval_len=16)
    return lambda: beam_search(model, prompts, settings, contexts)


def make_cases(size: str) -> dict[Case, Callable[[], object]]:
    """What to time: kind, what is varied, its value."""
    cases: dict[Case, Callable[[], object]] = {}
    for what, values in TRAINING.items():
        for value in values:
            cases["training", what, value] = training_step(size, **MIDDLE | {what: value})
    for what, values in SEARCH.items():
        for value in values:
            cases["decoding", what, value] = search(size, **SEARCH_MIDDLE | {what: value})
    return cases


def time_cases(cases: dict[Case, Callable[[], object]], rounds: int) -> dict[Case, list[float]]:
    """Seconds of each, all in turns, after a round that warms up."""
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for case, work in cases.items():
            started = perf_counter()
            work()
            if number:
                seconds[case].append(perf_counter() - started)
    return seconds


def train_by_processes(processes: int, folder: Path) -> float:
    """Real tokens per second of all together, one thread each, the same global batch of 8."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    work_dir = folder / f"{processes} at {perf_counter()}"
    flags = {
        "train_batch_size": 8 // processes, "max_step": 60, "warmup_step": 1, "log_interval": 50,
        "valid_samples": 0, "eval_interval": 1000, "device": "cpu", "work_dir": work_dir,
    }  # fmt: skip
    subprocess.run(
        [sys.executable, *launcher, str(common.ROOT / "gpt2_ft.py"),
         *(f"--{name}={value}" for name, value in flags.items())],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
    )  # fmt: skip
    record = json.loads((work_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return record["tokens_per_second"]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=common.SIZES, default="small", help="default: small")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    gpu.reuse_freed_memory()
    seconds = time_cases(make_cases(args.size), args.rounds)
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for processes, own in speeds.items():
                own.append(train_by_processes(processes, Path(folder)))
    result = {
        "benchmark": "scaling", "size": args.size, "machine": common.machine(args.threads),
        "cases": [
            {"kind": kind, "what": what, "value": value, "seconds": common.summary(own)}
            for (kind, what, value), own in seconds.items()
        ],
        "processes": {n: common.summary(own) for n, own in speeds.items()},
    }  # fmt: skip
    print(common.write_result("scaling", result))


if __name__ == "__main__":
    run(main)
