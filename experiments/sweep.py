"""Which method for my data: train, decode and score each, over seeds, and compare them.

    python -m experiments.sweep --methods lora:r=4 full --max_step 50     the shipped sample, base
    python -m experiments.sweep --train_data train.jsonl --valid_data valid.jsonl \\
        --test_data test.jsonl --init_checkpoint gpt2 --vocab vocab --out results/mine \\
        --methods lora:r=4 lora:r=16,targets=all full top2 bitfit --lr 2e-4 1e-3 5e-3 \\
        --max_step 2000 --seeds 3

The learning rate of each method is chosen by the validation loss after --grid_steps. Each run
writes its result into --out, its files into --out/runs. The same command again does what is missing
and resumes what was stopped. At the end stand a table and a figure in --out/comparison.md and .png.
"""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
from common.errors import InputError, Parser
from common.errors import run as run_program
from common.files import make_folder
from common.locks import locked
from common.sample import sample_settings
from data.fields import add_fields_flag
from data.readers import DataFile
from decoding import SearchSettings
from eval.metrics import METRICS
from experiments.compare import write_report
from experiments.launch import carry_out
from experiments.methods import KINDS, Method, checked_rates, parse_methods
from experiments.runs import GRID_SEED, Run, Setup, is_done, read_result
from experiments.slurm import submit

FILES = {
    "train_data": "rows to train on; with none of these four, the shipped sample and base",
    "valid_data": "rows whose loss chooses the learning rate",
    "test_data": "rows that are decoded and scored",
    "init_checkpoint": "base: file, folder or gpt2[-medium ...]",
}
RATES = (2e-4, 1e-3, 5e-3)
LOSS_TOLERANCE = 0.01
# The trainer's flags by which a run is what its name, its table row and its result say.
SET_BY_RUNS = {
    "--method", "--use_rslora", "--lora_kind", "--train_top",
    "--vocab", "--fields", "--train_data", "--valid_data", "--init_checkpoint", "--lr",
    "--max_step", "--random_seed", "--train_batch_size", "--seq_len", "--work_dir", "--resume",
    *(f"--{option.flag}" for kind in KINDS.values() for option in kind.options.values()),
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Methods to compare: each with every number of rows (0 is all) and every seed, the learning
    rates between which short runs choose, and the steps of a run and of a short one."""

    setup: Setup
    methods: tuple[Method, ...]
    rates: tuple[float, ...] = RATES
    steps: int = 1000
    grid_steps: int = 200
    seeds: tuple[int, ...] = (1, 2, 3)
    rows: tuple[int, ...] = (0,)

    def rates_of(self, method: Method) -> tuple[float, ...]:
        return method.rates or self.rates

    def grid(self) -> list[Run]:
        """The short runs: one for each rate of a method that has several."""
        return [run for method in self.methods for run in self.grid_of(method)]

    def grid_of(self, method: Method) -> list[Run]:
        """The short runs of one method."""
        rates = self.rates_of(method)
        if len(rates) == 1:
            return []
        steps = min(self.grid_steps, self.steps)
        return [Run(self.setup, method, lr, steps, GRID_SEED, is_of_grid=True) for lr in rates]

    def rate(self, method: Method) -> float | None:
        """The learning rate of a method, None where no short run of it came to a loss."""
        runs = self.grid_of(method)
        if not runs:
            return self.rates_of(method)[0]
        losses = {
            run.lr: read_result(run)["valid_loss"].get("last") for run in runs if is_done(run)
        }
        return chosen_rate(losses)

    def runs(self) -> list[Run]:
        """The runs of the methods whose learning rate is known, those of the first seed first."""
        rates = {method: self.rate(method) for method in self.methods}
        return [
            Run(self.setup, method, rate, self.steps, seed, rows)
            for seed in self.seeds
            for rows in self.rows
            for method, rate in rates.items()
            if rate is not None
        ]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is compared on which data."""
    add = parser.add_argument
    add("--methods", nargs="+", default=["lora:r=4", "full"], metavar="KIND[:NAME=VALUE,...]",
        help=f"of {', '.join(KINDS)}; the first is what the others are compared with "
        "(default: lora:r=4 full); docs/sweep.md has their settings")  # fmt: skip
    for name, text in FILES.items():
        add(f"--{name}", help=text)
    add("--vocab", help="folder of the vocabulary, which text rows need")
    add_fields_flag(add)
    add("--task", choices=METRICS, default="own",
        help="whose scores (default: own; e2e for the sample)")  # fmt: skip
    add("--lr", nargs="+", type=float, default=RATES,
        help="learning rates to choose from (default: 2e-4 1e-3 5e-3)")  # fmt: skip
    add("--grid_steps", type=int, default=200, help="steps of the runs that choose (default: 200)")
    add("--max_step", type=int, default=1000, help="steps of a run (default: 1000)")
    add("--seeds", type=int, default=3, help="runs of each method (default: 3)")
    add("--rows", type=int, nargs="+", default=[0],
        help="training rows, at random by seed; 0 is all (default: 0)")  # fmt: skip
    add("--train_flags", default="", metavar="FLAGS",
        help='="--label_smooth 0 --bf16" gives these to every training')  # fmt: skip
    add("--train_batch_size", type=int, default=8, help="default: 8")
    add("--seq_len", type=int, default=512, help="default: 512, or the sample's")
    add("--beam", type=int, default=10, help="default: 10")
    add("--length_penalty", type=float, default=0.8, help="default: 0.8")
    add("--eval_len", type=int, default=64, help="most generated tokens (default: 64)")
    add("--choose", choices=("last", "best"), default="last",
        help="the adapter that is decoded: the last, or the best on validation")  # fmt: skip
    add("--out", default="runs/sweep", help="folder of the results (default: runs/sweep)")


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how runs are carried out."""
    add = parser.add_argument
    add("--workers", type=int, default=1, help="runs at a time (default: 1)")
    add("--threads", type=int, default=1, help="of each run (default: 1)")
    add("--launcher", choices=("local", "slurm"), default="local",
        help="slurm: a task of a job array for each run; the same command collects")  # fmt: skip
    add("--sbatch", default="", metavar="FLAGS", help='="--gpus=1" gives this to sbatch')
    add("--dry_run", action="store_true", help="list what is done and what is not, and end")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the flags; raise InputError for one that is missing or out of its range."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    add_launch_flags(parser)
    args = parser.parse_args(argv)
    given = [name for name in FILES if getattr(args, name)]
    if absent := [name for name in FILES if name not in given]:
        if given:
            raise InputError(f"--{absent[0]} is missing; give all of --{', --'.join(FILES)}")
        sample = sample_settings()
        used = {name: sample[name] for name in (*FILES, "vocab", "seq_len")}
        parser.set_defaults(**used, task="e2e")
        args = parser.parse_args(argv)
    for name in ("grid_steps", "max_step", "seeds", "train_batch_size", "workers", "threads"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} must be at least 1")
    if min(args.rows) < 0:
        raise InputError(f"--rows {min(args.rows)} must be at least 0, which is all")
    checked_rates(args.lr, "--lr")
    check_train_flags(args.train_flags)
    try:
        SearchSettings(beam=args.beam, length_penalty=args.length_penalty, eval_len=args.eval_len)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    return args


def check_train_flags(text: str) -> None:
    """Refuse flags of --train_flags that would take the place of those that each run sets.

    Raises:
        InputError: names the flag, or says that the text cannot be split into flags.
    """
    try:
        given = [word.partition("=")[0] for word in shlex.split(text) if word.startswith("-")]
    except ValueError as error:
        raise InputError(f"--train_flags {text!r} cannot be read: {error}") from error
    for flag in given:
        # The trainer knows a flag by the beginning of its name, too.
        if any(own.startswith(flag) for own in SET_BY_RUNS):
            raise InputError(
                f"--train_flags has {flag}, which each run sets itself; give it to the sweep, as a "
                "flag or a setting of --methods, or leave it out"
            )


def make_setup(needed_rows: int = 0, **given: Any) -> Setup:
    """Return what the runs share. All files are read once, so that what is wrong with one is said
    before anything is trained.

    Args:
        needed_rows: how many training rows some run takes at least.
        given: fields of `Setup`, all but those that the files say.

    Raises:
        InputError: a file cannot be read, has fewer rows than are asked for, or the base has fewer
            positions.
    """
    path, columns = given["train_data"], given.get("fields")
    train, rows = read_through(path, columns)
    if rows < needed_rows:
        raise InputError(f"--rows {needed_rows} is more than the {rows} of {path}")
    valid, _ = read_through(given["valid_data"], columns)
    test, _ = read_through(given["test_data"], columns)
    base = checkpoints.read_base(given["init_checkpoint"])
    setup = Setup(**given, base=base.fingerprint, train=train, valid=valid, test=test, rows=rows)
    checkpoints.check_window(setup.seq_len, base.n_positions)
    checkpoints.check_room("eval_len", setup.eval_len, base.n_positions)
    return setup


def read_through(path: str, fields: str | None) -> tuple[str, int]:
    """Return the sha256 of a data file and the number of its rows."""
    data = DataFile(path, fields)
    rows = sum(1 for _ in data)
    return data.sha256, rows


def carry_out_all(comparisons: Sequence[Comparison], args: argparse.Namespace, title: str) -> int:
    """Carry out what is missing of the grids, then of the runs; report; return the exit code.

    Raises:
        InputError: another sweep is at work in the same folder.
    """
    if args.dry_run:
        for comparison in comparisons:
            show(comparison)
        return 0
    setup = comparisons[0].setup
    make_folder(setup.folder)
    with locked(setup.folder, f"--out {setup.out}", "sweep"):
        return do_what_is_missing(comparisons, args, title)


def do_what_is_missing(
    comparisons: Sequence[Comparison], args: argparse.Namespace, title: str
) -> int:
    """As `carry_out_all`, for the one sweep that works in the folder."""
    is_whole = launch([run for each in comparisons for run in each.grid()], args)
    if args.launcher == "slurm" and not is_whole:
        return 0
    for comparison in comparisons:
        for method in comparison.methods:
            if comparison.grid_of(method):
                print(f"{method.name}: {said_of_rate(comparison, method)}", flush=True)
    runs = [run for comparison in comparisons for run in comparison.runs()]
    is_whole &= launch(runs, args)
    if report := write_report(title, Path(comparisons[0].setup.out), runs):
        print(f"\n{report}\n{comparisons[0].setup.out}/{title}.md has this, with its figure")
    return 0 if is_whole or args.launcher == "slurm" else 1


def launch(runs: list[Run], args: argparse.Namespace) -> bool:
    """Carry out what is missing of the runs as the flags say; return whether none is missing."""
    if args.launcher == "slurm":
        return submit(runs, args.workers, args.threads, args.sbatch)
    return carry_out(runs, args.workers, args.threads)


def chosen_rate(losses: Mapping[float, float | None]) -> float | None:
    """Return the lowest learning rate whose loss is within 1 % of the best, as what just does in a
    short run may diverge in a long one, which stays longer at its peak. A loss of None is that of a
    run that diverged; None where every one did."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    limit = (1 + LOSS_TOLERANCE) * min(finite.values(), default=0)
    return min((rate for rate, loss in finite.items() if loss <= limit), default=None)


def said_of_rate(comparison: Comparison, method: Method) -> str:
    """Return which learning rate a method got, with a warning at the edge of its grid."""
    rate, rates = comparison.rate(method), sorted(comparison.rates_of(method))
    if rate is None:
        return "every learning rate failed, so it is left out"
    is_edge = rate in (rates[0], rates[-1])
    edge = f"; the {'lowest' if rate == rates[0] else 'highest'} tried, so try others"
    return f"learning rate {rate:g}{edge if is_edge else ''}"


def show(comparison: Comparison) -> None:
    """List the runs, done and not; those whose learning rate is still to be chosen, too."""
    for run in comparison.grid():
        print(f"grid/{run.name}: {'done' if is_done(run) else 'to be run'}")
    known = {run.name: run for run in comparison.runs()}
    for seed in comparison.seeds:
        for rows in comparison.rows:
            for method in comparison.methods:
                run = Run(comparison.setup, method, 0, comparison.steps, seed, rows)
                is_whole = run.name in known and is_done(known[run.name])
                print(f"{run.name}: {'done' if is_whole else 'to be run'}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 1 where a run failed."""
    args = parse_args(None if argv is None else [*argv])
    same = ("out", *FILES, "vocab", "task", "fields", "train_batch_size", "seq_len", "beam",
            "length_penalty", "eval_len", "choose", "train_flags")  # fmt: skip
    setup = make_setup(max(args.rows), **{name: getattr(args, name) for name in same})
    comparison = Comparison(
        setup, tuple(parse_methods(args.methods)), checked_rates(args.lr, "--lr"),
        args.max_step, args.grid_steps, tuple(range(1, args.seeds + 1)),
        tuple(dict.fromkeys(args.rows)),
    )  # fmt: skip
    return carry_out_all([comparison], args, "comparison")


if __name__ == "__main__":
    run_program(main)
