"""What a GPU can do here, measured part by part in one command.

    python -m benchmarks.gpu                   all parts;  --part NAME one of them

    tests       tests/test_cuda.py
    train-sm    steps of gpt2.sm: attention padded and packed, blocks compiled, steps recorded as
                CUDA graphs, compiled or not, in fp32, bf16 and fp16, of 8, 32 and 128 rows;
                transformers + peft and trl's SFTTrainer, if installed
    train-md    the same of gpt2.md
    memory      peak memory by model, rows, --gradient_checkpointing and --base_dtype
    decode      beam search, and transformers' generate, if installed
    ddp         tokens per second of 1, 2, 4 … processes with a GPU each

All weights are random, the rows those of the shipped sample or, with DATA_DIR, of E2E. A part ends
within --minutes: what it does not reach has a row that says so. Tables go to the terminal and
results to results/gpu/PART.json. --device cpu runs all of it at toy sizes, to see that it runs.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import torch

import gpt2_ft
import gpu
from benchmarks import common, gpu_peers, tables
from benchmarks.decode import RULES
from common import packed_attention
from common.errors import InputError, Parser
from common.errors import run as run_program
from common.files import read_json_lines, write_json
from decoding.beam_search import SearchSettings, beam_search
from decoding.packed import pack
from model import MODEL_CARDS, GPT2Config, GPT2LMModel
from training.run import Run
from training.setup import prepare

WARM_UP, STEPS = 3, 10
ROUNDS = 3  # through the same steps, of which the last is timed: graphs are recorded in the second
RESULTS = common.ROOT / "results" / "gpu"
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row of a table: what it is of, and what measures it."""

    labels: Row
    measure: Callable[[], Row]


@dataclass(frozen=True)
class Bench:
    """Where everything is measured, and how large it is."""

    device: torch.device
    folder: Path

    @property
    def is_toy(self) -> bool:
        return self.device.type == "cpu"

    @cached_property
    def data(self) -> Path:
        """Token ids, in JSONL."""
        return common.read_samples("train", self.folder)[1]

    @property
    def data_flags(self) -> dict[str, object]:
        """The same as flags of gpt2_ft.py; a toy has the small vocabulary, which its ids are of."""
        if self.is_toy:
            text = common.ROOT / "data" / "sample" / "train.jsonl"
            return {"train_data": text, "vocab": common.NANO}
        return {"train_data": self.data}

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("fp32", "bf16") if self.is_toy else ("fp32", "bf16", "fp16")

    @property
    def batches(self) -> tuple[int, ...]:
        return (2,) if self.is_toy else (8, 32, 128)

    def card(self, size: str) -> str:
        return "gpt2.nano" if self.is_toy else f"gpt2.{size}"

    def make_run(self, size: str, precision: str, *flags: str) -> Run:
        """A run of random weights, ready for its first step, that neither logs nor saves."""
        argv = self.data_flags | {
            "init_checkpoint": "none", "model_card": self.card(size), "device": self.device.type,
            "optimizer": "torch", "log_interval": 10**6, "eval_interval": 10**6,
            "save_interval": 10**6, "max_step": 10**6, "warmup_step": 0, "max_bad_steps": 100,
        }  # fmt: skip
        half = [] if precision == "fp32" else [f"--{precision}"]
        flat = [f"--{name}={value}" for name, value in argv.items()]
        args = gpt2_ft.parse_args([*flat, *half, *flags])
        return prepare(args, gpu.parse_gpu(args), self.folder, None)

    def synchronize(self) -> None:
        if not self.is_toy:
            torch.cuda.synchronize()

    def shape(self, size: str) -> dict[str, Any]:
        """Fields of `GPT2Config`, always with GPT-2's vocabulary."""
        return MODEL_CARDS[self.card(size)] | {"vocab_size": 50257}


class Latest:
    """The last object made of some settings, so that cases in a row share a model, and the one
    before is freed first."""

    def __init__(self) -> None:
        self.key: object = None
        self.made: Any = None

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        if key != self.key:
            self.made = None
            self.key, self.made = key, make()
        return self.made


def time_steps(bench: Bench, run: Run, batch: int, steps: int = STEPS) -> Row:
    """Seconds a step, real tokens a second and peak memory, after rounds that warm up."""
    order = itertools.cycle(range(len(run.train)))
    chosen = [[next(order) for _ in range(batch)] for _ in range(steps)]
    tokens = int(sum(run.train.lengths[rows].sum() for rows in chosen))
    seconds = 0.0
    gpu_peers.reset_memory(bench.device)
    for _ in range(ROUNDS):
        bench.synchronize()
        started = perf_counter()
        for rows in chosen:
            run.outstanding.append(gpt2_ft.optimizer_step(run, [rows]))
            run.batches_taken = 1  # never the last of an epoch, after which the loop would wait
            gpt2_ft.settle_steps(run)
        bench.synchronize()
        seconds = perf_counter() - started
    return {
        "ms/step": round(1e3 * seconds / steps, 2),
        "tokens/s": round(tokens / seconds),
        "peak GB": round(run.runtime.peak_memory_gb(), 2),
    }


def padded_attention() -> AbstractContextManager:
    """Within the block attention is padded also where it could be packed."""
    return mock.patch.object(packed_attention, "is_possible", return_value=False)


LADDER = {
    "padded": (), "packed": (), "compiled": ("--compile",), "graphs": ("--cuda_graphs",),
    "compiled graphs": ("--compile", "--cuda_graphs"),
}  # fmt: skip
CUDA_ONLY = ("graphs", "compiled graphs")
HALVES_ONLY = ("packed", *CUDA_ONLY)  # as there is no kernel of attention for fp32


def training_cases(bench: Bench, size: str) -> Iterator[Case]:
    """A ladder for each precision and number of rows, and the peers."""
    latest = Latest()

    def ours(way: str, precision: str, batch: int) -> Row:
        flags = LADDER[way]
        run = latest.get((precision, flags), partial(bench.make_run, size, precision, *flags))
        with padded_attention() if way == "padded" else nullcontext():
            return time_steps(bench, run, batch)

    peers = gpu_peers.TRAINING
    for precision, way in itertools.product(bench.precisions, (*LADDER, *peers)):
        if way in HALVES_ONLY and precision == "fp32" or way in CUDA_ONLY and bench.is_toy:
            continue
        for batch in bench.batches:
            labels = {"precision": precision, "way": way, "rows": batch}
            if way in peers:
                settings = gpu_peers.Settings(
                    bench.device, bench.folder, bench.data, bench.shape(size),
                    precision, batch, WARM_UP, STEPS,
                )  # fmt: skip
                yield Case(labels, partial(peers[way], settings))
            else:
                yield Case(labels, partial(ours, way, precision, batch))


def memory_cases(bench: Bench) -> Iterator[Case]:
    """Two steps each, in bf16."""
    latest = Latest()

    def measure(size: str, dtype: str, batch: int, checkpointing: bool) -> Row:
        flags = [] if dtype == "fp32" else [f"--base_dtype={dtype}"]
        run = latest.get((size, dtype), lambda: bench.make_run(size, "bf16", *flags))
        run.model.transformer.gradient_checkpointing = checkpointing
        return time_steps(bench, run, batch, steps=2)

    sizes = ("sm",) if bench.is_toy else ("sm", "md", "lg", "xl")
    cases = itertools.product(sizes, ("fp32", "bf16"), bench.batches, (False, True))
    for size, dtype, batch, checkpointing in cases:
        labels = {
            "model": bench.card(size), "base": dtype, "rows": batch,
            "checkpointing": "yes" if checkpointing else "no",
        }  # fmt: skip
        yield Case(labels, partial(measure, size, dtype, batch, checkpointing))


def decode_cases(bench: Bench) -> Iterator[Case]:
    """Contexts of the sample, each once; no text ends early."""
    rules: dict[str, Any] = RULES | ({"beam": 2, "eval_len": 4} if bench.is_toy else {})
    distinct = list(dict.fromkeys(tuple(r["context"]) for r in read_json_lines(bench.data)))
    latest = Latest()

    def make_model(size: str, precision: str) -> GPT2LMModel:
        torch.manual_seed(0)
        model = GPT2LMModel(GPT2Config(**bench.shape(size))).to(bench.device).eval()
        return pack(model, precision)

    def ours(size: str, precision: str, contexts: list[list[int]]) -> Row:
        model = latest.get((size, precision), partial(make_model, size, precision))
        runtime = gpu.Runtime(bench.device, precision=precision)
        prompts = [torch.tensor(context, device=bench.device) for context in contexts]
        gpu_peers.reset_memory(bench.device)
        seconds = 0.0
        for length in (2, rules["eval_len"]):  # libraries start in the first
            bench.synchronize()
            started = perf_counter()
            with runtime.autocast():
                settings = SearchSettings(**rules | {"eval_len": length})
                beam_search(model, prompts, settings, len(prompts))
            seconds = (perf_counter() - started) / len(prompts)
        return {"s/context": round(seconds, 4), "peak GB": round(runtime.peak_memory_gb(), 2)}

    sizes = ("sm",) if bench.is_toy else ("sm", "md")
    for size, precision, batch in itertools.product(sizes, bench.precisions, bench.batches):
        contexts = [list(context) for context in distinct[:batch]]
        labels = {"model": bench.card(size), "precision": precision, "contexts": batch}
        yield Case(labels | {"way": "ours"}, partial(ours, size, precision, contexts))
        shape = bench.shape(size)
        theirs = partial(gpu_peers.generate, bench.device, shape, precision, contexts, rules)
        yield Case(labels | {"way": "transformers"}, theirs)


def ddp_cases(bench: Bench) -> Iterator[Case]:
    """Processes of `torchrun`, each with 8 rows a step."""
    count = 2 if bench.is_toy else torch.cuda.device_count()
    powers = [2**i for i in range(count.bit_length()) if 2**i <= count]

    def measure(processes: int) -> Row:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        work_dir = bench.folder / f"ddp-{processes}"
        steps = 4 if bench.is_toy else 100
        flags = bench.data_flags | {
            "init_checkpoint": "none", "model_card": bench.card("sm"), "max_step": steps,
            "device": bench.device.type, "warmup_step": 0, "valid_samples": 0,
            "log_interval": steps // 2, "work_dir": work_dir, "optimizer": "torch",
        }  # fmt: skip
        command = [sys.executable, *launcher, str(common.ROOT / "gpt2_ft.py"), "--bf16"]
        done = subprocess.run(
            [*command, *(f"--{name}={value}" for name, value in flags.items())],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(" ".join(done.stderr.split())[-200:])
        lines = (work_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
        last = [r for r in map(json.loads, lines) if r["kind"] == "train"][-1]
        return {"tokens/s": round(last["tokens_per_second"]), "loss": round(last["loss"], 4)}

    for processes in powers:
        yield Case({"processes": processes}, partial(measure, processes))


def test_cases(bench: Bench) -> Iterator[Case]:
    """The GPU's own tests."""

    def measure() -> Row:
        # Here the releases of others may be newer than those that the tests are held to.
        lenient = ["-W", "default::DeprecationWarning"]
        command = [sys.executable, "-m", "pytest", "-q", *lenient, "tests/test_cuda.py"]
        done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, timeout=450)
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        summary = (done.stdout.splitlines() or [done.stderr[-200:]])[-1]
        return {"outcome": summary, "failed": failed}

    yield Case({"tests": "tests/test_cuda.py"}, measure)


PARTS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "tests": test_cases,
    "train-sm": partial(training_cases, size="sm"),
    "train-md": partial(training_cases, size="md"),
    "memory": memory_cases,
    "decode": decode_cases,
    "ddp": ddp_cases,
}


def measure_part(cases: Iterator[Case], minutes: float) -> list[Row]:
    """The rows of a part. What fails, or is not reached in time, has a note in place of figures."""
    rows, end = [], perf_counter() + 60 * minutes
    for case in cases:
        row = dict(case.labels)
        if perf_counter() > end:
            row["note"] = f"not reached in {minutes:g} minutes"
        else:
            try:
                row |= case.measure()
            except ImportError as error:
                row["note"] = f"{error.name} is not installed"
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
            except Exception as error:  # the other rows are to be measured all the same
                reason = next(iter(str(error).splitlines()), "")
                row["note"] = f"failed: {type(error).__name__}: {reason:.150}"
        print("  " + ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """A Markdown table with a column for each name in any of the rows."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    return tables.grid(head, [[str(row.get(name, "")) for name in head] for row in rows])


def card(device: torch.device) -> Row:
    """What the figures were measured on."""
    machine = common.machine(torch.get_num_threads())
    if device.type == "cpu":
        return machine
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    gpus = {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return machine | gpus | {"cuda": torch.version.cuda, "driver": driver[0] if driver else None}


def main(argv: list[str] | None = None) -> None:
    """Measure the parts one after the other, and print and keep each."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--part", choices=PARTS, action="append", help="may be repeated; default: all")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    add("--output", type=Path, help="folder of the results; default: results/gpu, of toys none")
    add("--minutes", type=float, default=8, help="of each part; default: 8")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "benchmarks.gpu measures a CUDA device, and PyTorch sees none here; --device cpu runs "
            "it at toy sizes"
        )
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(torch.device(args.device), Path(folder))
        for name in args.part or PARTS:
            print(f"{name}:", flush=True)
            rows = measure_part(PARTS[name](bench), args.minutes)
            failed += [row["note"] for row in rows if "failed: " in row.get("note", "")]
            failed += [line for row in rows for line in row.get("failed", ())]
            print(f"\n{table(rows)}", flush=True)
            if output := args.output or (None if bench.is_toy else RESULTS):
                path = output / f"{name}.json"
                write_json(path, {"part": name, "machine": card(bench.device), "rows": rows})
                print(f"{path}\n", flush=True)
    if failed:
        raise InputError(f"{len(failed)} measurements or tests failed, the first: {failed[0]}")


if __name__ == "__main__":
    run_program(main)
