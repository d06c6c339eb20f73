"""A training run: what it consists of, how it is saved, and how it goes on after a stop."""

import argparse
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
from training.log import RunLog


class AverageMeter:
    """A weighted running mean: `val` is the last value, `avg` the mean of all since `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.val = self.avg = self.sum = self.count = 0.0

    def update(self, val: float, n: float = 1) -> None:
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count if self.count else 0.0


@dataclass
class Run:
    """All that a training run consists of.

    `step` counts updates, `window` the global batches taken from the data: more, where a step had
    to be skipped. `no_better` counts validations since the best one. `saved` holds `step` and
    `validated_step` of the last save, `signal` what this process was sent, `stopping` and
    `save_due` what all ranks agreed on.
    """

    args: argparse.Namespace
    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: GradScaler
    train: FT_Dataset
    valid: FT_Dataset | None
    sampler: EpochSampler
    header: AdapterHeader
    tokenizer: Tokenizer | None = None
    log: RunLog | None = None
    step: int = 0
    window: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    no_better: int = 0
    validated_step: int = -1
    saved: tuple[int, int] = (-1, -1)
    saved_at: float = field(default_factory=time.monotonic)
    save_due: bool = False
    bad_steps: int = 0
    signal: int = 0
    stopping: bool = False
    average: AverageMeter = field(default_factory=AverageMeter)

    @property
    def epoch(self) -> int:
        """The epoch that the last window was part of, from 1 up."""
        return max(1, math.ceil(self.window / self.sampler.steps_per_epoch))

    @property
    def out_of_patience(self) -> bool:
        """Whether `--patience` is given and as many validations in a row were no better."""
        return 0 < self.args.patience <= self.no_better

    @property
    def finished(self) -> bool:
        return self.step == self.args.max_step or self.out_of_patience

    @property
    def trained(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        parameters = gpu.unwrap(self.model).named_parameters()
        return {name: p for name, p in parameters if p.requires_grad}

    @property
    def kept(self) -> dict[str, Tensor]:
        """The saved tensors by name: the trained ones, and what an adapter's kind keeps frozen."""
        return lora.lora_state_dict(gpu.unwrap(self.model)) | self.trained

    def adapter_path(self, name: int | str) -> Path:
        """`model.{name}.safetensors` in the work_dir; name is a step, or best."""
        return Path(self.args.work_dir) / f"model.{name}.safetensors"


def write_adapter(run: Run, name: int | str) -> None:
    """Write the adapter's tensors as they are after `run.step` steps; rank 0 only."""
    if run.args.rank == 0:
        header = replace(run.header, step=run.step)
        checkpoints.save_adapter(run.adapter_path(name), run.kept, header)
