"""Runs as tasks of a Slurm job array, one each.

python -m experiments.slurm FILE NUMBER [THREADS]     what a task does: the run on that line
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.errors import run as run_program
from common.files import replacing
from data.rows import write_jsonl
from experiments.launch import missing, summary
from experiments.methods import Method
from experiments.runs import ROOT, Run, Setup, perform

SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name=sweep
#SBATCH --array=0-{last}%{workers}
#SBATCH --cpus-per-task={threads}
#SBATCH --output={folder}/slurm-%A_%a.out
cd {root}
exec {python} -m experiments.slurm {tasks} "$SLURM_ARRAY_TASK_ID" {threads}
"""


def submit(runs: Sequence[Run], workers: int, threads: int, flags: str) -> bool:
    """Submit what is missing of the runs, unless a job submitted before is still at it; return
    whether there is nothing left to do."""
    left = missing(runs)
    if not left:
        return True
    folder = (left[0].setup.folder / "slurm").resolve()
    job = folder / "job.txt"
    if job.is_file() and is_queued(number := job.read_text(encoding="utf-8").strip()):
        print(f"job {number} is queued or runs; the same command later collects {len(left)} runs")
        return False
    tasks, script = folder / "tasks.jsonl", folder / "array.sh"
    write_jsonl(tasks, map(asdict, left))
    with replacing(script) as file:
        file.write(
            SCRIPT.format(
                last=len(left) - 1, workers=workers, threads=threads, folder=folder,
                root=shlex.quote(str(ROOT)), python=shlex.quote(sys.executable),
                tasks=shlex.quote(str(tasks)),
            )
        )  # fmt: skip
    number = sbatch(script, flags)
    with replacing(job) as file:
        file.write(number + "\n")
    print(f"job {number}: {len(left)} runs submitted; the same command later collects them")
    return False


def sbatch(script: Path, flags: str) -> str:
    """Submit a script with flags of sbatch's own; return the number of the job."""
    if shutil.which("sbatch") is None:
        raise InputError("--launcher slurm needs sbatch, which is not on PATH; or leave it out")
    command = ["sbatch", "--parsable", *shlex.split(flags), str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"sbatch refused {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def is_queued(job: str) -> bool:
    """Return whether the job waits or runs; False where squeue does not know it."""
    if shutil.which("squeue") is None:
        return False
    command = ["squeue", "--noheader", "--jobs", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0 and bool(done.stdout.strip())


def run_of(task: dict[str, Any]) -> Run:
    """Return the run that a line of tasks.jsonl describes."""
    method = task["method"]
    settings = tuple((name, value) for name, value in method["settings"])
    own = Method(method["kind"], settings, tuple(method["rates"]))
    return Run(**task | {"setup": Setup(**task["setup"]), "method": own})


def main(argv: Sequence[str] | None = None) -> None:
    """What one task of the array does."""
    file, number, *threads = sys.argv[1:] if argv is None else argv
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    run = run_of(json.loads(lines[int(number)]))
    print(f"{run.name}: {summary(perform(run, int(threads[0]) if threads else 1))}")


if __name__ == "__main__":
    run_program(main)
