"""One run of a comparison: train, decode, score, and its result as results/ keeps it.

A result belongs to its settings: the method, the learning rate, the seed, the hashes of base and
data, and whatever else decides its numbers. They stand in it and in the run's folder.
"""

import math
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import read_adapter
from common.errors import InputError
from common.files import make_folder, read_json_lines, write_json
from data.readers import DataFile, Record
from data.rows import write_jsonl
from eval.summary import are_scores, checked_scores, read_json
from experiments.methods import Method

ROOT = Path(__file__).resolve().parents[1]

GRID_SEED = 0
CHECKS = 4  # validations of a run, saves too; epochs end with one as well
LOG_LINES = 20
DIVERGED = "had a loss or gradient that is not finite"  # as gpt2_ft.py says it
# The processes that run now, so that whoever ends this one can end them.
processes: set[subprocess.Popen] = set()


@dataclass(frozen=True)
class Setup:
    """What all runs of a comparison share: files, their hashes, and how texts are made.

    `out` is the folder of the results; `variant` tells apart runs on other data in the same one;
    `train_flags` are further flags of every training.
    `base` is the base's fingerprint, `train`, `valid` and `test` are the sha256 of the data files,
    `rows` is the number of training rows. `choose` names the adapter that is decoded: last, or best
    on validation.
    """

    out: str
    train_data: str
    valid_data: str
    test_data: str
    init_checkpoint: str
    base: str
    train: str
    valid: str
    test: str
    rows: int
    vocab: str | None = None
    task: str = "own"
    fields: str | None = None
    variant: str = ""
    train_flags: str = ""
    train_batch_size: int = 8
    seq_len: int = 512
    beam: int = 10
    length_penalty: float = 0.8
    eval_len: int = 64
    choose: str = "last"

    @property
    def folder(self) -> Path:
        """Where the runs' own files are: adapters, logs, texts."""
        return Path(self.out) / "runs"


@dataclass(frozen=True)
class Run:
    """One run: a method with its learning rate, steps, seed and number of training rows, 0 for all.
    A run of the grid is trained only: it compares learning rates by their validation loss."""

    setup: Setup
    method: Method
    lr: float
    steps: int
    seed: int
    rows: int = 0
    is_of_grid: bool = False

    @property
    def name(self) -> str:
        parts = [self.method.name]
        parts += [f"{self.rows}rows"] if self.rows else []
        parts += [self.setup.variant] if self.setup.variant else []
        parts += [f"lr{self.lr:g}"] if self.is_of_grid else []
        parts += [f"{self.steps}steps"]
        parts += [] if self.is_of_grid else [f"seed{self.seed}"]
        return "-".join(parts)

    @property
    def result(self) -> Path:
        return Path(self.setup.out) / ("grid" if self.is_of_grid else "") / f"{self.name}.json"

    @property
    def folder(self) -> Path:
        return self.setup.folder / ("grid" if self.is_of_grid else "") / self.name

    def settings(self) -> dict[str, Any]:
        """Return all that decides the run's numbers."""
        setup = self.setup
        training = {
            "method": self.method.describe(), "lr": self.lr, "steps": self.steps,
            "seed": self.seed, "rows": self.rows or setup.rows, "base": setup.base,
            "train_data": setup.train, "valid_data": setup.valid, "fields": setup.fields,
            "train_batch_size": setup.train_batch_size, "seq_len": setup.seq_len,
        }  # fmt: skip
        if setup.train_flags:
            training["train_flags"] = setup.train_flags
        if self.is_of_grid:
            return training
        return training | {
            "test_data": setup.test, "task": setup.task, "choose": setup.choose,
            "beam": setup.beam, "length_penalty": setup.length_penalty, "eval_len": setup.eval_len,
        }  # fmt: skip


def is_done(run: Run) -> bool:
    """Return whether the run has its result.

    Raises:
        InputError: a result, or a run's folder, has its name and other settings.
    """
    for path in (run.result, run.folder / "settings.json"):
        if path.is_file():
            found = read_json(path).get("settings")
            _check_settings(run, path, found if isinstance(found, dict) else {})
    return run.result.is_file()


def _check_settings(run: Run, path: Path, found: dict[str, Any]) -> None:
    ours = run.settings()
    other = [name for name in ours | found if ours.get(name) != found.get(name)]
    if other:
        place = path.parent if path.name == "settings.json" else path
        changes = ", ".join(f"{n} {_short(found.get(n))}, now {_short(ours.get(n))}" for n in other)
        raise InputError(
            f"{place} is of other settings ({changes}); remove it, or give another --out"
        )


def _short(value: object) -> str:
    return f"{value!s:.12}" if isinstance(value, str) else str(value)


def read_result(run: Run) -> dict[str, Any]:
    """Return the result of a run that is done.

    Raises:
        InputError: it lacks what tables are made of, as a file that was changed may.
    """
    result = read_json(run.result)
    by_name = ["valid_loss"] if run.is_of_grid else ["valid_loss", "scores", "seconds"]
    numbers = [] if run.is_of_grid else ["lr", "trainable", "peak_memory_gb"]
    wrong = [name for name in by_name if not are_scores(result.get(name))]
    wrong += [name for name in numbers if type(result.get(name)) not in (int, float)]
    if wrong:
        raise InputError(
            f"{run.result}: {wrong[0]} is missing or damaged; delete the file, and the same "
            "command makes it again"
        )
    return result


def perform(run: Run, threads: int = 1) -> dict[str, Any]:
    """Do what is left of a run; write and return its result.

    Raises:
        InputError: a part of it failed; names the part, what it said last, and the log.
    """
    make_folder(run.folder)
    write_json(run.folder / "settings.json", {"settings": run.settings()})
    done = run.folder / "seconds.json"
    seconds = checked_scores(read_json(done), done) if done.is_file() else {}
    for part, command in commands(run).items():
        if part in seconds:
            continue
        is_resumed = part == "training" and (run.folder / "state.pt").is_file()
        started = time.monotonic()
        try:
            execute(run, part, command, threads)
        except InputError as error:
            if run.is_of_grid and DIVERGED in str(error):
                failed = {"valid_loss": {"last": None}, "failed": str(error)}
                return keep(run, failed | {"variant": run.setup.variant})
            raise
        seconds[part] = None if is_resumed else round(time.monotonic() - started, 1)
        write_json(done, seconds)
    return keep(run, describe(run, seconds))


def keep(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """Write a run's result, and delete what is of no use any more: the state that it would resume
    from and, of a run of the grid, all the rest."""
    result = result | {"method": run.method.name, "settings": run.settings()}
    write_json(run.result, result)
    (run.folder / "state.pt").unlink(missing_ok=True)
    if run.is_of_grid:
        shutil.rmtree(run.folder)
    return result


def commands(run: Run) -> dict[str, list[str]]:
    """The arguments of Python for each part of the run, in order."""
    setup, folder = run.setup, run.folder
    often = max(run.steps // CHECKS, 1)
    columns, vocab = flags(fields=setup.fields), flags(vocab=setup.vocab)
    training = [
        "gpt2_ft.py", *run.method.flags, *vocab, *flags(**training_files(run), lr=run.lr),
        *flags(init_checkpoint=setup.init_checkpoint, max_step=run.steps, random_seed=run.seed),
        *flags(train_batch_size=setup.train_batch_size, seq_len=setup.seq_len, valid_batch_size=16),
        *flags(eval_interval=often, save_interval=often, keep_last=1, valid_samples=0),
        *flags(log_interval=max(run.steps // LOG_LINES, 1), work_dir=folder, resume="auto"),
        *shlex.split(setup.train_flags),
    ]  # fmt: skip
    if run.is_of_grid:
        return {"training": training}
    predictions = folder / "predictions.jsonl"
    decoding = [
        "gpt2_beam.py", "--resume", *vocab, *columns, *flags(init_checkpoint=setup.init_checkpoint),
        *flags(adapter=f"{folder}:{setup.choose}", data=setup.test_data, output_file=predictions),
        *flags(beam=setup.beam, length_penalty=setup.length_penalty, eval_len=setup.eval_len),
    ]  # fmt: skip
    scoring = [
        "-m", "eval.evaluate", *vocab, *columns, *flags(task=setup.task, data=setup.test_data),
        *flags(predictions=predictions, json=folder / "scores.json"),
    ]  # fmt: skip
    return {"training": training, "decoding": decoding, "scoring": scoring}


def flags(**values: object) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def execute(run: Run, part: str, command: list[str], threads: int) -> None:
    """Run one part; what it prints goes to log.txt in the run's folder."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    log, last = run.folder / "log.txt", ""
    with log.open("ab", buffering=0) as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        processes.add(process)
        for line in process.stdout or ():
            last = line.decode(errors="replace").strip() or last
            with suppress(OSError):  # on a full disk the last line still says what failed
                file.write(line)
        code = process.wait()
        processes.discard(process)
    if code:
        said = last.removeprefix("error: ") or f"exit code {code}"
        raise InputError(f"{part} of {run.name} failed: {said}; {log} has all that it said")


def training_files(run: Run) -> dict[str, str | None]:
    """The flags that name the rows of a run. Of fewer than all rows, it is as many at random, by
    its seed, and they have the usual columns."""
    setup = run.setup
    if not run.rows:
        names = {"train_data": setup.train_data, "valid_data": setup.valid_data}
        return names | {"fields": setup.fields}
    folder = setup.folder / "subsets" / (setup.variant or "all")
    chosen, valid = folder / f"{run.rows}-seed{run.seed}.jsonl", folder / "valid.jsonl"
    rows = [plain_row(record) for record in DataFile(setup.train_data, setup.fields)]
    write_jsonl(chosen, random.Random(run.seed).sample(rows, run.rows))
    write_jsonl(valid, map(plain_row, DataFile(setup.valid_data, setup.fields)))
    return {"train_data": str(chosen), "valid_data": str(valid)}


def plain_row(record: Record) -> dict[str, Any]:
    """Return a row under the usual names of its columns."""
    return {"context": record.context, "completion": record.completion}


def describe(run: Run, seconds: dict[str, float | None]) -> dict[str, Any]:
    """The result of a run as results/ keeps it; a part that was done in pieces has no seconds."""
    header, _ = read_adapter(f"{run.folder}:last")
    records = read_json_lines(run.folder / "log.jsonl")
    curves = {
        kind: [[r["step"], rounded(r["loss"])] for r in records if r["kind"] == kind]
        for kind in ("train", "valid")
    }
    run_json = read_json(run.folder / "run.json")
    options = dict(run.method.settings)
    assert header and header.settings  # it was trained here
    # What makes a prefix in training is no part of it.
    counted = "saved_parameters" if header.prefix else "trained_parameters"
    result = {
        "kind": run.method.kind,
        "rank": int(options.get("r", 0)),
        "seed": run.seed,
        "rows": run.rows or run.setup.rows,
        "targets": options.get("targets", ""),
        "lr": run.lr,
        "steps": header.step,
        "batch": header.settings["global_batch"],
        "trainable": run_json["settings"][counted],
        "valid_loss": {
            "last": curves["valid"][-1][1],
            "best": min((loss for _, loss in curves["valid"] if loss is not None), default=None),
        },
        "curves": curves,
        "seconds": seconds,
        "peak_memory_gb": round(max(r.get("peak_memory_gb", 0) for r in records), 3),
        "base": header.base.fingerprint,
        "git_commit": run_json["git_commit"],
        "torch": run_json["torch"],
        "variant": run.setup.variant,
        "subset": run.rows,
    }
    if not run.is_of_grid:
        scored = read_json(run.folder / "scores.json")
        result["scores"] = {
            name: value and round(value, 4) for name, value in scored["scores"].items()
        }
        result["ser"] = result["scores"].get("SER")
        result["slots"] = scored.get("slots")
    return result


def rounded(loss: float) -> float | None:
    """A loss as results keep it: None where training diverged, as JSON has no other word for it."""
    return round(loss, 4) if math.isfinite(loss) else None
