"""Kills training runs at random instants, resumes them, and compares what they end with.

    python -m experiments.soak --steps 2000 --kills 20

A run is first left alone, on one process and on two. Then the same run is killed again and again,
by -9 or TERM, and resumed by `--resume auto` or by torchrun's own restarts. Where a tmpfs can be
mounted (as root) it also runs on a disk that is always too full. Prints one table; exit code 1
where bytes differ. What is drawn follows from --seed; when it strikes, from the machine's speed,
too: some lives end before training starts, so that there are fewer starts than stops.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import Parser, run

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCHER += ["--max-restarts", "1000"]
LONGEST_SILENCE = 180.0  # seconds without a new log record that count as a hang
ENDS_BY_TERM = (0, 128 + signal.SIGTERM, -signal.SIGTERM)  # done, after a save, before training


@dataclass
class Soak:
    """A training run that is stopped and resumed; it prints into a file next to its folder."""

    folder: Path
    output: Path
    rows: Path
    processes: int
    steps: int
    keep_last: int = 3
    stops: int = 0

    def start(self) -> subprocess.Popen:
        """The run's next life."""
        settings = {
            "train_data": self.rows, "valid_data": self.rows, "model_card": "gpt2.nano",
            "init_checkpoint": ROOT / "data" / "nano" / "model.safetensors", "device": "cpu",
            "seq_len": 16, "lora_dim": 2, "train_batch_size": 2, "grad_acc": 2, "lr": 0.001,
            "warmup_step": 5, "max_step": self.steps, "log_interval": 1, "eval_interval": 50,
            "save_interval": 10, "keep_last": self.keep_last, "work_dir": self.folder,
            "resume": "auto",
        }  # fmt: skip
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        launcher = LAUNCHER if self.processes == 2 else []
        with self.output.open("a", encoding="utf-8") as output:
            return subprocess.Popen(
                [sys.executable, *launcher, str(ROOT / "gpt2_ft.py"), *flags],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def logged(self) -> int:
        """Bytes of log records so far."""
        log = self.folder / "log.jsonl"
        return log.stat().st_size if log.exists() else 0

    def wait(self, process: subprocess.Popen, seconds: float = float("inf")) -> bool:
        """Whether the process ended within that time.

        Raises:
            SystemExit: it hangs: it wrote no record for `LONGEST_SILENCE` seconds.
        """
        now = changed = time.monotonic()
        deadline, logged = now + seconds, self.logged()
        while process.poll() is None and now < deadline:
            time.sleep(min(0.02, deadline - now))
            now = time.monotonic()
            if self.logged() != logged:
                logged, changed = self.logged(), now
            if now - changed > LONGEST_SILENCE:
                kill(process)
                self.fail("it hangs")
        return process.poll() is not None

    def fail(self, reason: str) -> None:
        """Give the soak up."""
        words = "\n".join(self.output.read_text(encoding="utf-8").splitlines()[-20:])
        raise SystemExit(f"{self.folder}: {reason}. Its last words:\n{words}")

    def starts(self) -> int:
        """How often training began or went on."""
        return self.output.read_text(encoding="utf-8").count("Settings other than ")

    def adapters(self) -> list[bytes]:
        """The last and the best adapter."""
        names = (f"model.{self.steps}.safetensors", "model.best.safetensors")
        return [(self.folder / name).read_bytes() for name in names]


def workers(process: subprocess.Popen) -> list[int]:
    """The processes below a launcher."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        if parent == process.pid:
            found.append(int(status.parent.name))
    return sorted(found)


def send(pid: int, number: int) -> None:
    """Signal a process that may have ended by now."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def kill(process: subprocess.Popen) -> None:
    """Kill a run with all its processes; the launcher first, so that it starts no other."""
    below = workers(process)
    process.kill()
    for pid in below:
        send(pid, signal.SIGKILL)
    process.wait()


def undisturbed(soak: Soak) -> tuple[float, float]:
    """Let the run be; returns the seconds to its first record, and those from there to its end."""
    begun, process = time.monotonic(), soak.start()
    while not soak.logged() and not soak.wait(process, 0.02):
        pass
    first = time.monotonic()
    soak.wait(process)
    if process.returncode:
        soak.fail(f"exit code {process.returncode}")
    return first - begun, time.monotonic() - first


def disturbed(soak: Soak, kills: int, longest_life: float, draw: random.Random) -> None:
    """Stop a run `kills` times, each after a random part of `longest_life` seconds; let it end."""
    process = soak.start()
    while soak.stops < kills and not soak.wait(process, draw.uniform(0, longest_life)):
        soak.stops += 1
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        below = workers(process) if soak.processes > 1 and draw.random() < 0.7 else []
        if below:
            send(draw.choice(below), number)
            continue  # its launcher starts all anew
        if number == signal.SIGKILL:
            kill(process)
        else:
            process.terminate()
            soak.wait(process)
            if soak.processes == 1 and process.returncode not in ENDS_BY_TERM:
                soak.fail(f"exit code {process.returncode} on TERM")
        process = soak.start()
    soak.wait(process)
    if process.returncode:
        soak.fail(f"exit code {process.returncode}")


def on_full_disk(soak: Soak) -> None:
    """Train on the tmpfs that holds `soak.folder`, and let it grow by a little at each stop."""
    size, process = 128.0, soak.start()  # KB
    while soak.wait(process) and process.returncode == 2:
        soak.stops, size = soak.stops + 1, size * 1.3
        grow = ["mount", "-o", f"remount,size={size:.0f}k", str(soak.folder.parent)]
        subprocess.run(grow, check=True)
        process = soak.start()
    if process.returncode:
        soak.fail(f"exit code {process.returncode}")


def memory_slope(log: Path) -> float:
    """Growth of the peak memory over the second half of a run, MB per 1000 steps."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    points = [(r["step"], r["peak_memory_gb"]) for r in records if r["kind"] == "train"]
    steps, memory = np.array(points[len(points) // 2 :]).T
    return float(np.polyfit(steps, memory, 1)[0]) * 1e6


def report(name: str, soak: Soak, equal: bool | None) -> None:
    """Print one line of the table."""
    slope, verdict = "", "yes" if equal else "NO"
    if equal is None:
        slope, verdict = f"{memory_slope(soak.folder / 'log.jsonl'):.2f}", "reference"
    line = (name, f"{soak.steps:,}", soak.stops, soak.starts(), verdict, slope)
    print(f"| {' | '.join(map(str, line))} |", flush=True)


def soak_processes(folder: Path, rows: Path, count: int, args: argparse.Namespace) -> bool:
    """The undisturbed and the killed run on `count` processes; whether they end the same."""
    names = [f"{kind}{count}" for kind in ("whole", "killed")]
    whole, killed = (
        Soak(folder / name, folder / f"{name}.txt", rows, count, args.steps) for name in names
    )
    startup, rest = undisturbed(whole)
    name = "one process" if count == 1 else "two processes"
    report(f"{name}, left alone", whole, None)
    # Half of this life is trained on average: all of them together take about the whole run.
    longest_life = startup + 2 * rest / max(args.kills, 1)
    disturbed(killed, args.kills, longest_life, random.Random(args.seed))
    equal = killed.adapters() == whole.adapters()
    report(f"{name}, killed", killed, equal)
    return equal


def soak_disk(folder: Path, rows: Path, args: argparse.Namespace) -> bool:
    """A run on a disk that fills up; whether it ends as one that was left alone. True where no
    tmpfs can be mounted."""
    steps = min(args.steps, 300)
    whole, full = (
        Soak(folder / name / "run", folder / f"{name}.txt", rows, 1, steps, keep_last=0)
        for name in ("roomy", "full")
    )
    full.folder.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(full.folder.parent)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        print("The full disk was left out: no tmpfs can be mounted here, which takes root")
        return True
    try:
        undisturbed(whole)
        on_full_disk(full)
        equal = full.adapters() == whole.adapters()
        report("one process, disk full", full, equal)
    finally:
        subprocess.run(["umount", str(full.folder.parent)], check=True)
    return equal


def write_rows(path: Path) -> None:
    """Forty short rows of token ids."""
    draw = random.Random(0)

    def ids() -> list[int]:
        return draw.choices(range(256), k=draw.randint(2, 7))

    rows = [{"context": ids(), "completion": ids()} for _ in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    """Run the soak; returns 1 where bytes differ."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of each run (default: 2000)")
    parser.add_argument("--kills", type=int, default=20, help="of each killed run (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--no_disk", action="store_true", help="leave the full disk out")
    args = parser.parse_args()
    print("| run | steps | stops | starts | same bytes | peak memory, MB per 1000 steps |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        write_rows(rows)
        equal = [soak_processes(folder, rows, count, args) for count in args.processes]
        if not args.no_disk:
            equal.append(soak_disk(folder, rows, args))
    return 0 if all(equal) else 1


if __name__ == "__main__":
    run(main)
