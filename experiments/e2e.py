"""The repository's experiment on E2E: groups of runs from the shipped mini base, into results/e2e/.

    python -m experiments.e2e                     every group, in the order in which they are listed
    python -m experiments.e2e must table3 --dry_run
    python -m experiments.e2e must --workers 2

Each group is a comparison as `experiments.sweep` makes it; what two groups share is run once. The
data are made by scripts/create_datasets.sh, of raw files in DATA_DIR or downloaded. Every run is
decoded on all 630 test inputs by beam 10 with length penalty 0.8.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from common.errors import InputError, Parser
from common.errors import run as run_program
from common.files import replacing
from experiments.methods import parse_methods
from experiments.runs import ROOT, Setup
from experiments.sweep import Comparison, add_launch_flags, carry_out_all, make_setup

RESULTS = "results/e2e"
BASE = "data/mini"
DATASET = Path("datasets/e2e")
VALID_ROWS = 400
GRID_STEPS = 200

# Learning rates between which 200 steps choose.
LORA = "lr=2e-3/5e-3/1e-2/2e-2"
FULL = "full:lr=5e-4/1e-3/2e-3/4e-3"
TOP2 = "top2:lr=1e-3/2e-3/5e-3/1e-2"
BITFIT = "bitfit:lr=5e-3/2e-2/5e-2/1e-1"
ADAPTERS = "lr=1e-3/3e-3/1e-2/3e-2"
ADAPTER_L = "lr=1e-3/3e-3/1e-2/3e-2/1e-1"


@dataclass(frozen=True)
class Group:
    """Runs that answer one question. Those on cleaned rows stand in it with those on all rows."""

    methods: tuple[str, ...]
    steps: int = 1000
    seeds: int = 3
    rows: tuple[int, ...] = (0,)
    variants: tuple[str, ...] = ("",)
    choose: str = "last"


GROUPS = {
    "must": Group(
        (FULL, f"lora:r=4,{LORA}", f"lora:r=16,{LORA}", f"lora:r=4,targets=all,{LORA}"), steps=5000
    ),
    # AdapterL in the two sizes of the paper's table 3: near LoRA's, and some 3 % of the weights.
    "table3": Group(
        (
            FULL,
            TOP2,
            BITFIT,
            f"adapter_l:dim=6,{ADAPTER_L}",
            f"adapter_l:dim=64,{ADAPTER_L}",
            f"adapter_h:dim=32,{ADAPTERS}",
            f"prefix:length=5,{ADAPTERS}",
            f"lora:r=4,{LORA}",
            f"lora:r=4,targets=all,{LORA}",
        )
    ),  # fmt: skip
    "ranks": Group(tuple(f"lora:r={rank},{LORA}" for rank in (1, 4, 16, 64))),
    "cleaned": Group((FULL, f"lora:r=4,{LORA}"), variants=("", "cleaned")),
    "lowdata": Group(
        (FULL, f"lora:r=4,{LORA}"), steps=400, seeds=5, rows=(50, 200, 500), choose="best"
    ),
    "kinds": Group(
        tuple(
            f"{kind}:r=4,{LORA}"
            for kind in ("lora", "rslora", "lora_plus", "dora", "pissa", "lora_fa")
        )
    ),
    "rslora": Group(tuple(f"rslora:r={rank},{LORA}" for rank in (1, 4, 16, 64))),
}


def write_data(variants: set[str]) -> None:
    """Make what is not there yet of the data files."""
    if not (DATASET / "test.jsonl").is_file():
        program("bash", "scripts/create_datasets.sh", "e2e")
    with (DATASET / "valid.jsonl").open(encoding="utf-8") as rows:
        write_lines(valid_file(), [*islice(rows, VALID_ROWS)])
    if "cleaned" in variants and not training_file("cleaned").is_file():
        program(
            sys.executable, "-m", "data.clean_e2e", raw_file("train.txt"),
            str(training_file("cleaned")), "--without", raw_file("valid.txt"), raw_file("test.txt"),
        )  # fmt: skip


def program(*command: str) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        raise InputError(f"{' '.join(command)} failed; what it printed says why")


def raw_file(name: str) -> str:
    """Return where a raw file of E2E is."""
    folders = [
        Path(folder) / "e2e" for folder in (os.environ.get("DATA_DIR"), "data_raw") if folder
    ]
    found = [folder / f"{name}{end}" for folder in folders for end in ("", ".gz")]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise InputError(f"{name} of E2E is missing; name its folder by DATA_DIR")
    return str(path)


def training_file(variant: str) -> Path:
    return DATASET / f"{variant + '_' if variant else ''}train.jsonl"


def valid_file() -> Path:
    return DATASET / f"valid.{VALID_ROWS}.jsonl"


def write_lines(path: Path, lines: list[str]) -> None:
    with replacing(path) as file:
        file.writelines(lines)


def setup_of(variant: str, choose: str) -> Setup:
    """Return what the runs on one training file share."""
    return make_setup(
        out=RESULTS, train_data=str(training_file(variant)), valid_data=str(valid_file()),
        test_data=str(DATASET / "test.jsonl"), init_checkpoint=f"{BASE}/model.safetensors",
        vocab=BASE, task="e2e", train_batch_size=8, seq_len=256, beam=10, length_penalty=0.8,
        eval_len=64, choose=choose, variant=variant,
    )  # fmt: skip


def comparisons_of(group: Group, max_step: int | None, seeds: int | None) -> list[Comparison]:
    """Return the comparisons of a group, one for each training file."""
    return [
        Comparison(
            setup_of(variant, group.choose),
            tuple(parse_methods(list(group.methods))),
            steps=max_step or group.steps,
            grid_steps=GRID_STEPS,
            seeds=tuple(range(1, (seeds or group.seeds) + 1)),
            rows=group.rows,
        )
        for variant in group.variants
    ]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 1 where a run failed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("groups", nargs="*", default=[*GROUPS], metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    add("--max_step", type=int, help="steps of a run (default: the group's)")
    add("--seeds", type=int, help="runs of each method (default: the group's)")
    add_launch_flags(parser)
    args = parser.parse_args(argv)
    if unknown := [name for name in args.groups if name not in GROUPS]:
        raise InputError(f"{unknown[0]} is no group of runs; name {', '.join(GROUPS)}")
    groups = {name: GROUPS[name] for name in args.groups}
    write_data({variant for group in groups.values() for variant in group.variants})
    codes = [
        carry_out_all(comparisons_of(group, args.max_step, args.seeds), args, name)
        for name, group in groups.items()
    ]
    return max(codes)


if __name__ == "__main__":
    run_program(main)
