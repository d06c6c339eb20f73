"""Whether a step may update anything, and when the loop hears of it: at once, or one step later.

A step whose gradient is not finite must change nothing. A CPU simply looks. A GPU would first have
to finish all its work to answer, so there it decides by itself: the optimizer changes nothing where
its `found_inf` is set, as torch's fused ones do. What the step came to is copied to the host
meanwhile, and the loop reads it once the next step is on its way.
"""

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gpu import Runtime
from optimizer import AdamW


class Updates(Protocol):
    """How the loop updates the parameters."""

    lag: int  # of how many steps the results may be outstanding

    def take(self, norm: Tensor) -> None:
        """Update the parameters by their gradients, whose norm this is, if it is finite."""

    def confirm(self, finite: bool) -> None:
        """Hear whether a step was finite, in the order of the steps."""


class CheckedUpdates:
    """Updates that wait for the device to say whether the gradient is finite."""

    lag = 0

    def __init__(self, optimizer: Optimizer, scheduler: LambdaLR, scaler: GradScaler) -> None:
        self.optimizer, self.scheduler, self.scaler = optimizer, scheduler, scaler

    def take(self, norm: Tensor) -> None:
        if torch.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.scheduler.step()

    def confirm(self, finite: bool) -> None:
        """Do nothing: `take` knew it."""


class DeferredUpdates:
    """Updates that the device skips by itself, so that nothing waits for it.

    The schedule counts the steps that are known to be finite. While one is not known yet, the next
    has one of two learning rates, between which the device chooses.
    """

    lag = 1

    def __init__(self, optimizer: Optimizer, scheduler: LambdaLR) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler
        self.outstanding: deque[Tensor] = deque()  # of each step not heard of: 1 if skipped, else 0
        # torch's fused kernel reads fp32; ours is to be as exact as a rate from the host.
        self.dtype = torch.float64 if isinstance(optimizer, AdamW) else torch.float32

    def take(self, norm: Tensor) -> None:
        skipped = torch.isfinite(norm).logical_not().float()
        groups = self.optimizer.param_groups
        known = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates(skipped), strict=True):
            group["lr"] = rate
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        for group, rate in zip(groups, known, strict=True):
            group["lr"] = rate
        self.outstanding.append(skipped)

    def _rates(self, like: Tensor) -> list[Tensor]:
        """The learning rate of each group in this step, scalars where `like` is."""
        schedule, taken, rates = self.scheduler, self.scheduler.last_epoch, []
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True):
            # full_like is a kernel with a number in it; a tensor made here would have to be sent.
            rate, next_rate = (
                torch.full_like(like, float(base * factor(step)), dtype=self.dtype)
                for step in (taken, taken + 1)
            )
            if self.outstanding:
                rate = torch.where(self.outstanding[0] > 0, rate, next_rate)
            rates.append(rate)
        return rates

    def confirm(self, finite: bool) -> None:
        self.outstanding.popleft()
        if finite:
            self.scheduler.step()


class Arriving:
    """Numbers on their way from the device to the host."""

    def __init__(self, numbers: Tensor) -> None:
        """Start the copy; nothing waits for it."""
        self.host, self.copied = numbers, None
        if numbers.is_cuda:
            self.host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.host.copy_(numbers, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> list[float]:
        """Return the numbers once they are there."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.host.tolist()


@dataclass(frozen=True)
class StepResult:
    """What one step came to: this rank's counted tokens, all its tokens, and what the device says,
    which is waited for when it is first asked for."""

    counted: float
    tokens: int
    numbers: Arriving  # norm, Σ loss, Σ smoothed loss, and over all ranks signals and saves due

    @cached_property
    def _values(self) -> list[float]:
        return self.numbers.read()

    @property
    def norm(self) -> float:
        """The gradient's norm before clipping."""
        return self._values[0]

    @property
    def loss(self) -> float:
        """This rank's loss per counted token, without smoothing."""
        return self._values[1] / max(self.counted, 1)

    @property
    def smoothed_loss(self) -> float:
        """This rank's loss per counted token, as it is optimised."""
        return self._values[2] / max(self.counted, 1)

    @property
    def stopping(self) -> bool:
        """Whether any rank was sent a signal."""
        return self._values[3] > 0

    @property
    def save_due(self) -> bool:
        """Whether the first rank's clock asks for a save."""
        return self._values[4] > 0


def defers(runtime: Runtime, optimizer: str) -> bool:
    """Whether the device skips steps by itself: on CUDA, by any optimizer but apex's."""
    return runtime.device.type == "cuda" and optimizer != "apex"
