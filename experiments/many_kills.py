"""Kills runs of every kind of training, and decodes, a few hundred times, and compares their bytes.

    python -m experiments.many_kills --kills 300

Each case first runs undisturbed. Then the same command is killed by signal 9 at a random instant of
its life and resumed, again and again, until it ends by itself; its files must be those of the
undisturbed run, byte for byte. Lives are forked from one process that has imported everything, so
a kill costs a second, and most strike while files are read, trained on or written. Prints one
table; exit code 1 where bytes differ. POSIX only.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import gpt2_beam
import gpt2_ft
from common import errors

ROOT = Path(__file__).resolve().parents[1]
NANO, SAMPLE = ROOT / "data" / "nano", ROOT / "data" / "sample"
TRAINING = {
    "train_data": SAMPLE / "valid.jsonl", "valid_data": SAMPLE / "valid.jsonl", "vocab": NANO,
    "init_checkpoint": NANO / "model.safetensors", "model_card": "gpt2.nano", "device": "cpu",
    "seq_len": 64, "train_batch_size": 2, "valid_batch_size": 64, "warmup_step": 2, "lr": 0.001,
    "max_step": 12, "log_interval": 1, "eval_interval": 4, "save_interval": 2, "valid_samples": 1,
    "resume": "auto",
}  # fmt: skip
METHODS = {
    "LoRA": [],
    "rsLoRA, all layers": ["--use_rslora", "--lora_targets", "all"],
    "LoRA+, two micro-batches": ["--lora_plus_ratio", "4", "--grad_acc", "2"],
    "DoRA": ["--lora_kind", "dora"],
    "PiSSA": ["--lora_kind", "pissa"],
    "LoRA-FA": ["--lora_kind", "lora_fa"],
    "AdapterL": ["--method", "adapter_l"],
    "AdapterH": ["--method", "adapter_h", "--adapter_dim", "8"],
    "prefix": ["--method", "prefix", "--prefix_hidden", "64"],
    "full": ["--method", "full", "--keep_last", "2"],
    "top": ["--lora_dim", "0", "--train_top", "1", "--keep_last", "1"],
    "top2": ["--method", "top2", "--keep_last", "1"],
    "bias": ["--method", "bitfit"],
    "best by BLEU": ["--valid_metric", "bleu", "--valid_texts", "6", "--valid_beam", "2"],
}


@dataclass
class Case:
    """A command that leaves files in a given folder, and how often it was killed."""

    name: str
    main: Callable[[list[str]], object]
    argv: Callable[[Path], list[str]]
    pattern: str
    kills: int = 0

    def live(self, folder: Path, seconds: float = float("inf")) -> bool:
        """Start the command, kill it after some seconds; whether it had ended by itself before.

        Raises:
            SystemExit: it ended with an error.
        """
        child = os.fork()
        if child == 0:
            quiet = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            try:
                errors.run(lambda: self.main(self.argv(folder)))  # type: ignore[arg-type, return-value]
            except SystemExit as end:
                os._exit(int(end.code or 0))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(70)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                if status:
                    words = (folder / "output.txt").read_text(encoding="utf-8").splitlines()[-5:]
                    raise SystemExit(f"{self.name}: a life ended badly:\n" + "\n".join(words))
                return True
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        self.kills += 1
        return False

    def files(self, folder: Path) -> dict[str, bytes]:
        """What the command left."""
        return {path.name: path.read_bytes() for path in sorted(folder.glob(self.pattern))}


def cases() -> Iterator[Case]:
    """Every method of training, then a search and a sampled decode."""
    flags = [part for name, value in TRAINING.items() for part in (f"--{name}", str(value))]
    for name, own in METHODS.items():

        def training(folder: Path, own: list[str] = own) -> list[str]:
            return [*flags, *own, "--work_dir", str(folder)]

        yield Case(f"training, {name}", gpt2_ft.main, training, "model.*.safetensors")
    for name, own in {
        "beam 4": ["--beam", "4", "--eval_len", "24"],
        "sampled": ["--do_sample", "--eval_len", "24", "--seed", "7"],
    }.items():

        def decoding(folder: Path, own: list[str] = own) -> list[str]:
            argv = ["--data", SAMPLE / "valid.jsonl", "--vocab", NANO, "--batch_size", "4"]
            argv += ["--init_checkpoint", NANO / "model.safetensors", "--device", "cpu", *own]
            argv += ["--output_file", folder / "predictions.jsonl"]
            started = any(folder.glob("*predictions.jsonl*"))
            return [str(part) for part in [*argv, *(["--resume"] if started else [])]]

        yield Case(f"decoding, {name}", gpt2_beam.main, decoding, "predictions.jsonl")


def attack(case: Case, folder: Path, kills: int, draw: random.Random) -> tuple[int, bool]:
    """Kill a case until it has been killed so often; how many whole runs that took, and whether all
    their files equal those of an undisturbed one."""
    (folder / "whole").mkdir(parents=True)
    begun = time.monotonic()
    case.live(folder / "whole")
    length, expected = time.monotonic() - begun, case.files(folder / "whole")
    runs, equal = 0, bool(expected)
    while case.kills < kills:
        own = folder / f"killed {runs}"
        own.mkdir()
        while not case.live(own, draw.uniform(0, length) if case.kills < kills else float("inf")):
            pass
        runs += 1
        equal &= case.files(own) == expected
    return runs, equal


def main(argv: list[str] | None = None) -> int:
    parser = errors.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="over all cases (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="of the instants (default: 1)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    draw, chosen, good = random.Random(args.seed), list(cases()), True
    print("| case | kills | whole runs | same bytes |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(chosen):
            kills = args.kills // len(chosen) + (number < args.kills % len(chosen))
            runs, equal = attack(case, Path(folder) / str(number), kills, draw)
            print(
                f"| {case.name} | {case.kills} | {runs} | {'yes' if equal else 'NO'} |", flush=True
            )
            good &= equal
    return 0 if good else 1


if __name__ == "__main__":
    errors.run(main)
