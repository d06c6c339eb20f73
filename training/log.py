"""What a run leaves in its work_dir for people: run.json, log.jsonl, TensorBoard."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from tqdm import tqdm

from common.errors import InputError
from common.files import replacing, write_json
from eval.choice import SCORES
from training import trackers

if TYPE_CHECKING:  # it takes a second to import, and only rank 0 needs it
    from torch.utils.tensorboard import SummaryWriter

# TensorBoard orders groups by the alphabet; equal tags of training and validation share a chart.
TAGS = {
    "loss": "loss/loss", "ppl": "loss/perplexity", "smoothed_loss": "loss/smoothed_loss",
    "lr": "lr/lr", "tokens_per_second": "speed/tokens_per_second",
    "peak_memory_gb": "speed/peak_memory_gb", "grad_norm": "update/gradient_norm",
} | {name: f"score/{name}" for name in SCORES}  # fmt: skip
BEST_LOSS, BEST_SCORE, UPDATE_NORM = "loss/best", "score/best", "update_norm"
ROOT = Path(__file__).resolve().parents[1]


def describe_run(flags: dict[str, object]) -> dict:
    """Return settings, versions and code of a run, as run.json keeps them."""
    return {
        "command": sys.argv,
        "settings": flags,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": platform.node(),
    }


def _git_commit() -> str | None:
    """The commit of this code; None where it is not in a repository, or there is no git."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


class RunLog:
    """Shows and keeps the course of a run: every record goes to log.jsonl and its numbers to
    TensorBoard, and where the flags ask for it to a CSV table and to Weights & Biases.

    Until it is opened it shows and keeps nothing, which is so on all ranks but 0.
    """

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = work_dir
        self.file: IO | None = None
        self.writers: dict[str, SummaryWriter] = {}
        self.csv = False
        self.wandb: Any = None
        self.bar = tqdm(disable=True)

    @contextmanager
    def opened(self, flags: dict[str, object], step: int, validated_step: int) -> Iterator[None]:
        """Open the logs, within the block, of a run with these flags that resumes after `step`.

        Records of what it will do again are dropped: training past `step`, validation past
        `validated_step`.
        """
        from torch.utils.tensorboard import SummaryWriter

        write_json(self.work_dir / "run.json", describe_run(flags))
        path = self.work_dir / "log.jsonl"
        old = path.read_bytes().splitlines(keepends=True) if path.exists() and step else []
        last = {"train": step, "valid": validated_step}
        with replacing(path, "wb") as file:
            file.writelines(line for line in old if _is_done(line, last))
        self.csv = bool(flags["csv"])
        if flags["wandb"]:
            self.wandb = trackers.start_wandb(str(flags["wandb"]), self.work_dir, flags)
        total = cast(int, flags["max_step"])
        self.bar = tqdm(total=total, initial=step, unit="step", disable=None)
        try:
            with self._reporting():
                self.file = path.open("a", encoding="utf-8")
                for kind, ending in (("train", ""), ("valid", "-valid")):
                    folder = self.work_dir / "tensorboard" / (self.work_dir.resolve().name + ending)
                    self.writers[kind] = SummaryWriter(folder, purge_step=last[kind] + 1)
            yield
        finally:
            self._close()

    def advance(self, loss: float) -> None:
        """Move the progress bar one step on; it is drawn on a terminal only."""
        self.bar.update()
        self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

    def record(self, kind: str, step: int, text: str, **values: float) -> None:
        """Print `text` and keep `values` under `kind` ("train" or "valid") and the step."""
        if self.file is None:
            return
        tqdm.write(text)
        sys.stdout.flush()
        with self._reporting():
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self.file.flush()
            for name, value in values.items():
                self.writers[kind].add_scalar(TAGS[name], value, step)
        if self.csv:
            trackers.write_csv(self.work_dir / "log.jsonl", self.work_dir / "log.csv")
        if self.wandb:
            self.wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def show(self, step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        """Put on TensorBoard, by their tags, what is no record."""
        if self.file is None:
            return
        with self._reporting():
            for tag, number in numbers.items():
                self.writers["train"].add_scalar(tag, number, step)
            for tag, text in texts.items():
                self.writers["train"].add_text(tag, text, step)

    def show_settings(self, settings: dict[str, object], result: str) -> None:
        """Put settings on TensorBoard's page of hyper-parameters, with the scalar `result`."""
        if self.file is None:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = {
            name: value if type(value) in (int, float) else str(value)
            for name, value in settings.items()
        }
        experiment, start, _ = hparams(plain, {result: None})
        with self._reporting():
            for summary in (experiment, start):
                cast(Any, self.writers["train"].file_writer).add_summary(summary)

    def sync(self) -> None:
        """Let what was recorded so far outlast a power cut."""
        if self.file is not None:
            with self._reporting():
                os.fsync(self.file.fileno())

    def _close(self) -> None:
        self.bar.close()
        with self._reporting():
            for open_file in (self.file, *self.writers.values()):
                if open_file is not None:
                    open_file.close()
        if self.wandb:
            self.wandb.finish()
        self.file, self.writers = None, {}

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"the logs in {self.work_dir} cannot be written: {error.strerror or error}"
            ) from error


def _is_done(line: bytes, last: dict[str, int]) -> bool:
    """Whether a log line is of a step that will not come again, and whole: a kill may cut one."""
    try:
        record = json.loads(line)
        return line.endswith(b"\n") and record["step"] <= last[record["kind"]]
    except (ValueError, KeyError, TypeError):
        return False
