"""The experiment on E2E: what is trained, rank and scaling, size of the data, layers; three seeds
each.

    python -m experiments.sweep [kinds] [ranks] [data] [targets] --workers 2 --threads 1

Each run adapts the mini base (`python -m data.make_base mini`) to E2E by 1,000 steps of batch 8,
decodes the 630 test inputs and scores them; its JSON goes to results/e2e-mini/, its files to
runs/sweep/. What is done is skipped, what was stopped is resumed. `--dry_run` lists both.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from checkpoints import read_adapter
from common.errors import InputError, run
from common.files import read_json_lines, replacing, write_json

ROOT = Path(__file__).resolve().parents[1]

RESULTS, RUNS = ROOT / "results" / "e2e-mini", ROOT / "runs" / "sweep"
DATASET = ROOT / "datasets" / "e2e"
SEEDS = (1, 2, 3)
STEPS = 1000
ALL_ROWS = 42_061
ROWS = (100, 500, 4000, ALL_ROWS)
TARGETS = ("q,v", "all", "fc,proj", "q,k,v,o")
VALID_ROWS = 400
# Flags of each kind, and its learning rate; docs/experiments.md says how these were chosen.
KINDS: dict[str, tuple[list[str], float]] = {
    "lora": ([], 5e-3),
    "rslora": (["--use_rslora"], 5e-3),
    "lora_plus": (["--lora_plus_ratio=16"], 2e-3),
    "dora": (["--lora_kind=dora"], 5e-3),
    "pissa": (["--lora_kind=pissa"], 5e-3),
    "lora_fa": (["--lora_kind=lora_fa"], 5e-3),
    "full": (["--lora_dim=0"], 2e-3),
    "top2": (["--lora_dim=0", "--train_top=2"], 2e-3),
    "bitfit": (["--lora_dim=0", "--train_bias=all"], 2e-2),
}
BASE = {
    "model_card": "gpt2.mini",
    "init_checkpoint": "data/mini/model.safetensors",
    "vocab": "data/mini",
}
TRAINING = {
    "seq_len": 256, "warmup_step": 100, "eval_interval": 250, "save_interval": 250, "keep_last": 1,
    "log_interval": 50, "valid_batch_size": 16, "resume": "auto",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One run: what is trained, with which rank, seed, number of training rows, in which layers."""

    kind: str = "lora"
    rank: int = 4
    seed: int = 1
    rows: int = ALL_ROWS
    targets: str = TARGETS[0]

    @property
    def adapter_rank(self) -> int:
        """The rank, 0 where no adapter is trained."""
        return 0 if "--lora_dim=0" in KINDS[self.kind][0] else self.rank

    @property
    def name(self) -> str:
        rank = f"-r{self.rank}" if self.adapter_rank else ""
        rows = f"-{self.rows}rows" if self.rows != ALL_ROWS else ""
        targets = f"-{self.targets.replace(',', '')}" if self.targets != TARGETS[0] else ""
        return f"{self.kind}{rank}{targets}{rows}-seed{self.seed}"

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.name}.json"


def settings_of(group: str) -> Iterator[Setting]:
    """The runs of a group, all of the first seed before those of the next."""
    for seed in SEEDS:
        if group == "kinds":
            yield from (Setting(kind, seed=seed) for kind in KINDS)
        if group == "ranks":
            for rank in (1, 4, 16, 64):
                yield from (Setting(kind, rank, seed) for kind in ("lora", "rslora"))
        if group == "data":
            yield from (Setting(seed=seed, rows=rows) for rows in ROWS)
        if group == "targets":
            yield from (Setting(seed=seed, targets=targets) for targets in TARGETS)


def write_splits() -> None:
    """Training rows in one order for all runs, of which each takes as many as it needs from the
    start, and the first validation rows."""
    if not (DATASET / "train.jsonl").is_file():
        subprocess.run(["bash", "scripts/create_datasets.sh", "e2e"], cwd=ROOT, check=True)
    rows = (DATASET / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    for count in ROWS:
        write_lines(RUNS / f"train.{count}.jsonl", rows[:count])
    valid = (DATASET / "valid.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    write_lines(RUNS / "valid.jsonl", valid[:VALID_ROWS])


def write_lines(path: Path, lines: list[str]) -> None:
    with replacing(path) as file:
        file.writelines(lines)


def flags(**values: object) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def perform(setting: Setting, args: argparse.Namespace) -> None:
    """Train, decode, score, and write the run's result.

    Raises:
        subprocess.CalledProcessError: one of the three failed; its words are in log.txt.
    """
    folder, kind = RUNS / setting.name, KINDS[setting.kind]
    is_resumed = (folder / "state.pt").exists()
    folder.mkdir(parents=True, exist_ok=True)
    test, predictions = DATASET / "test.jsonl", folder / "predictions.jsonl"
    own = []
    if setting.adapter_rank:
        own = flags(lora_dim=setting.rank, lora_targets=setting.targets)
    data = flags(train_data=RUNS / f"train.{setting.rows}.jsonl", valid_data=RUNS / "valid.jsonl")
    commands = {
        "training": [
            "gpt2_ft.py", *flags(**BASE, **TRAINING), *data, *own, *kind[0],
            *flags(lr=kind[1], max_step=STEPS, random_seed=setting.seed, work_dir=folder),
        ],
        "decoding": [
            "gpt2_beam.py", *flags(data=test, adapter=f"{folder}:last", output_file=predictions),
            *flags(init_checkpoint=BASE["init_checkpoint"], vocab=BASE["vocab"]),
        ],
        "scoring": [
            "-m", "eval.evaluate", "--task=e2e",
            *flags(data=test, predictions=predictions, json=folder / "scores.json"),
        ],
    }  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    seconds: dict[str, float | None] = {}
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        for name, command in commands.items():
            started = time.monotonic()
            subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log,
                stderr=subprocess.STDOUT, check=True,
            )  # fmt: skip
            seconds[name] = round(time.monotonic() - started, 1)
    if is_resumed:
        seconds["training"] = None
    write_json(setting.result, describe(setting, folder, seconds))


def describe(setting: Setting, folder: Path, seconds: dict[str, float | None]) -> dict:
    """The result of a run as results/ keeps it; no seconds of a part that was done in pieces."""
    header, _ = read_adapter(f"{folder}:last")
    records = read_json_lines(folder / "log.jsonl")
    curves = {
        kind: [[r["step"], round(r["loss"], 4)] for r in records if r["kind"] == kind]
        for kind in ("train", "valid")
    }
    run_json = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["scores"]
    assert header and header.settings  # it was trained here
    return {
        "kind": setting.kind,
        "rank": setting.adapter_rank,
        "seed": setting.seed,
        "rows": setting.rows,
        "targets": setting.targets,
        "lr": KINDS[setting.kind][1],
        "steps": header.step,
        "batch": header.settings["global_batch"],
        "trainable": run_json["settings"]["trained_parameters"],
        "scores": {name: value and round(value, 4) for name, value in scores.items()},
        "valid_loss": {
            "last": curves["valid"][-1][1],
            "best": min(loss for _, loss in curves["valid"]),
        },
        "curves": curves,
        "seconds": seconds,
        "base": header.base.fingerprint,
        "git_commit": run_json["git_commit"],
        "torch": run_json["torch"],
    }


def attempt(setting: Setting, args: argparse.Namespace) -> bool:
    """Whether the run succeeded; says how it went. One that fails does not stop the others."""
    try:
        perform(setting, args)
    except (subprocess.CalledProcessError, InputError) as error:
        print(f"{setting.name} failed: {error}; see {RUNS / setting.name}/log.txt", flush=True)
        return False
    result = json.loads(setting.result.read_text(encoding="utf-8"))
    print(f"{setting.name}: {result['scores']} in {result['seconds']}", flush=True)
    return True


def main() -> int:
    """Run what is missing; returns 1 where a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = ("kinds", "ranks", "data", "targets")
    parser.add_argument("groups", nargs="*", default=groups, help=f"of {', '.join(groups)}")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="of each (default: 1)")
    parser.add_argument("--dry_run", action="store_true", help="list what is done and what is not")
    args = parser.parse_args()
    if unknown := set(args.groups) - set(groups):
        raise InputError(f"{unknown.pop()} is no group of runs; name {', '.join(groups)}")
    chosen = dict.fromkeys(s for group in args.groups for s in settings_of(group))
    missing = [setting for setting in chosen if not setting.result.exists()]
    if args.dry_run:
        for setting in chosen:
            print(f"{setting.name}: {'to be run' if setting in missing else 'done'}")
        return 0
    if not (ROOT / BASE["init_checkpoint"]).is_file():
        raise InputError(f"{BASE['init_checkpoint']} is missing; python -m data.make_base mini")
    write_splits()
    with ThreadPoolExecutor(args.workers) as pool:
        return 0 if all(list(pool.map(lambda s: attempt(s, args), missing))) else 1


if __name__ == "__main__":
    run(main)
