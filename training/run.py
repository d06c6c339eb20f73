"""A training run: what it consists of, and how its adapter is written."""

import math
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import checkpoints
import gpu
import loralib as lora
from checkpoints import AdapterHeader
from data_utils import EpochSampler, FT_Dataset
from eval.choice import LOSS, is_better
from gpu import Runtime
from methods.prefix import KEY_VALUES
from model import GPT2LMModel
from training.graphs import Graphs
from training.log import RunLog
from training.scores import Scoring, ValidTexts
from training.updates import Updates


class Interrupted(Exception):
    """A signal has come to some rank while all of them validate."""


@dataclass(frozen=True)
class Plan:
    """How long a run is, in optimizer steps, and how many rows a step has. `max_epoch` is None
    where `max_step` alone bounds the run."""

    global_batch: int
    grad_acc: int
    steps_per_epoch: int
    max_step: int
    max_epoch: int | None
    warmup_step: int

    def occasions(self, interval: int) -> int:
        """Return how often something is done that is done at an interval and as an epoch ends."""
        last = self.max_step + 1
        steps = {*range(interval, last, interval), self.max_step}
        return len(steps.union(range(self.steps_per_epoch, last, self.steps_per_epoch)))


@dataclass(frozen=True)
class RunSettings:
    """What the training loop obeys, each by the name of its flag."""

    work_dir: Path
    label_smooth: float
    clip: float
    max_bad_steps: int
    valid_batch_size: int
    valid_samples: int
    patience: int
    log_interval: int
    eval_interval: int
    save_interval: int
    save_minutes: float
    keep_last: int


@dataclass
class Interval:
    """What one rank has seen since training was last logged: sums over its counted tokens, the
    norm of the last gradient, and how many tokens passed in how many seconds."""

    loss: float = 0.0  # without smoothing
    smoothed_loss: float = 0.0  # as it is optimised
    count: float = 0.0
    norm: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> "Interval":
        """Return the interval that a state holds; an older one has the smoothed sum alone."""
        if "interval" in saved:
            return cls(**saved["interval"])
        loss, count = saved["meter"]["sum"], saved["meter"]["count"]
        return cls(loss=loss, smoothed_loss=loss, count=count)


@dataclass
class Run:
    """All that a training run consists of. Without `graphs` every kernel is launched by the host.

    `flags` holds the value of every flag, as run.json keeps them; the loop reads `settings` and
    `plan`. `step` counts updates, `batches_taken` the global batches taken from the data: more,
    where a step had to be skipped. `best_loss` and `best_scores` are those of the best validation,
    which the metric of `scoring` decides; `no_better` counts validations since then. `last_save`
    holds `step` and `validated_step` of the last save, `saved_at` its time; `good_step` is the step
    of the last save that a finite step followed, -1 for none. `signal` is what this
    process was sent, `stopping` and `save_due` what all ranks agreed on. `outstanding` holds the
    results of steps that were not read yet; where something is logged, saved or validated, none is.
    """

    runtime: Runtime
    settings: RunSettings
    plan: Plan
    flags: dict[str, object]
    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: GradScaler
    updates: Updates
    graphs: Graphs | None
    train: FT_Dataset
    valid: FT_Dataset | None
    sampler: EpochSampler
    header: AdapterHeader
    log: RunLog
    tokenizer: Tokenizer | None = None
    scoring: Scoring = Scoring()
    valid_texts: ValidTexts | None = None
    step: int = 0
    batches_taken: int = 0
    best_loss: float = math.inf
    best_scores: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    no_better: int = 0
    validated_step: int = -1
    last_save: tuple[int, int] = (-1, -1)
    saved_at: float = field(default_factory=time.monotonic)
    good_step: int = -1
    save_due: bool = False
    bad_steps: int = 0
    signal: int = 0
    stopping: bool = False
    interval: Interval = field(default_factory=Interval)
    outstanding: deque = field(default_factory=deque)

    @property
    def epoch(self) -> int:
        """The epoch that the last batch was part of, from 1 up."""
        return max(1, math.ceil(self.batches_taken / self.plan.steps_per_epoch))

    @property
    def best_value(self) -> float | None:
        """The value of the best validation by the metric that decides, None before there is one."""
        found = {LOSS: self.best_loss} | self.best_scores
        return found[self.scoring.decider] if self.best_step else None

    def count_validation(self, loss: float, scores: dict[str, float]) -> bool:
        """Count a validation of this step, and return whether it is the best so far. An earlier one
        that is as good stays the best."""
        value = ({LOSS: loss} | scores)[self.scoring.decider]
        better = not math.isnan(loss) and is_better(self.scoring.decider, value, self.best_value)
        self.validated_step = self.step
        self.no_better = 0 if better else self.no_better + 1
        if better:
            self.best_loss, self.best_scores, self.best_step = loss, scores, self.step
        return better

    def forget_best(self) -> None:
        """Let the next validation count as the best."""
        self.best_loss, self.best_scores, self.best_step, self.no_better = math.inf, {}, 0, 0

    def obey_signals(self) -> None:
        """Raise `Interrupted` on all ranks, which call this together, where one was sent a signal.

        Raises:
            Interrupted: then `stopping` is set.
        """
        self.stopping = self.stopping or self.runtime.sum(self.signal)[0] > 0
        if self.stopping:
            raise Interrupted

    @property
    def out_of_patience(self) -> bool:
        """Whether `--patience` is given and as many validations in a row were no better."""
        return 0 < self.settings.patience <= self.no_better

    @property
    def validation_due(self) -> bool:
        """Whether to validate at this step, if it ends neither an epoch nor the run."""
        is_last = self.finished or self.batches_taken % self.plan.steps_per_epoch == 0
        return self.step > 0 and self.step % self.settings.eval_interval == 0 and not is_last

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step >= self.plan.max_step or self.out_of_patience

    @property
    def trained(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return trained_tensors(gpu.unwrap(self.model))

    @property
    def saved(self) -> dict[str, Tensor]:
        """The tensors of the adapter file by name."""
        return saved_tensors(gpu.unwrap(self.model))

    @property
    def in_state(self) -> dict[str, Tensor]:
        """The tensors of state.pt by name."""
        return state_tensors(gpu.unwrap(self.model))

    def adapter_path(self, name: int | str) -> Path:
        """Return `model.{name}.safetensors` in the work_dir; the name is a step, or best."""
        return self.settings.work_dir / f"model.{name}.safetensors"

    @property
    def replaced_best_path(self) -> Path:
        """Where the best adapter that the saved state names waits once there is a better one."""
        return self.settings.work_dir / ".model.best.replaced.safetensors"


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what an adapter file holds of a model, by name: of a prefix its numbers, which the
    trained tensors make; of all else what state.pt holds."""
    prefix = cast(GPT2LMModel, model).transformer.prefix
    return {KEY_VALUES: prefix.numbers().detach()} if prefix is not None else state_tensors(model)


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a run resumes from, by name: the trained tensors, and what an adapter's kind
    keeps frozen."""
    return lora.lora_state_dict(model) | trained_tensors(model)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def write_best(run: Run) -> None:
    """Write the best adapter; the one before stays until a state that names this one is saved."""
    best = run.adapter_path("best")
    if run.runtime.rank == 0 and best.is_file() and not run.replaced_best_path.is_file():
        best.replace(run.replaced_best_path)
    write_adapter(run, "best")


def write_adapter(run: Run, name: int | str) -> None:
    """Write the adapter's tensors as they are after `run.step` steps; on rank 0 only."""
    if run.runtime.rank == 0:
        header = replace(run.header, step=run.step)
        checkpoints.save_adapter(run.adapter_path(name), run.saved, header)
