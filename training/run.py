"""A training run: what it consists of, and how its adapter is written."""

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

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
from gpu import Runtime
from training.log import RunLog


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


class AverageMeter:
    """The sum and the count of a weighted mean since the last `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sum = self.count = 0.0

    def update(self, value: float, n: float = 1) -> None:
        """Count `value` `n` times."""
        self.sum += value * n
        self.count += n


@dataclass
class Run:
    """All that a training run consists of.

    `flags` holds the value of every flag, as run.json keeps them; the loop reads `settings` and
    `plan`. `step` counts updates, `batches_taken` the global batches taken from the data: more,
    where a step had to be skipped. `no_better` counts validations since the best one. `last_save`
    holds `step` and `validated_step` of the last save, `saved_at` its time. `signal` is what this
    process was sent, `stopping` and `save_due` what all ranks agreed on.
    """

    runtime: Runtime
    settings: RunSettings
    plan: Plan
    flags: dict[str, object]
    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: GradScaler
    train: FT_Dataset
    valid: FT_Dataset | None
    sampler: EpochSampler
    header: AdapterHeader
    log: RunLog
    tokenizer: Tokenizer | None = None
    step: int = 0
    batches_taken: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    no_better: int = 0
    validated_step: int = -1
    last_save: tuple[int, int] = (-1, -1)
    saved_at: float = field(default_factory=time.monotonic)
    save_due: bool = False
    bad_steps: int = 0
    signal: int = 0
    stopping: bool = False
    average: AverageMeter = field(default_factory=AverageMeter)

    @property
    def epoch(self) -> int:
        """The epoch that the last batch was part of, from 1 up."""
        return max(1, math.ceil(self.batches_taken / self.plan.steps_per_epoch))

    @property
    def out_of_patience(self) -> bool:
        """Whether `--patience` is given and as many validations in a row were no better."""
        return 0 < self.settings.patience <= self.no_better

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step == self.plan.max_step or self.out_of_patience

    @property
    def trained(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        parameters = gpu.unwrap(self.model).named_parameters()
        return {name: p for name, p in parameters if p.requires_grad}

    @property
    def saved(self) -> dict[str, Tensor]:
        """The saved tensors by name: the trained ones, and what an adapter's kind keeps frozen."""
        return lora.lora_state_dict(gpu.unwrap(self.model)) | self.trained

    def adapter_path(self, name: int | str) -> Path:
        """Return `model.{name}.safetensors` in the work_dir; the name is a step, or best."""
        return self.settings.work_dir / f"model.{name}.safetensors"


def write_adapter(run: Run, name: int | str) -> None:
    """Write the adapter's tensors as they are after `run.step` steps; on rank 0 only."""
    if run.runtime.rank == 0:
        header = replace(run.header, step=run.step)
        checkpoints.save_adapter(run.adapter_path(name), run.saved, header)
