"""A training run: what it consists of, how it is saved, and how it goes on after a stop."""

import argparse
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import checkpoint
import gpu
import loralib as lora
from data_utils import EpochSampler, FT_Dataset
from errors import InputError
from run_log import RunLog

PROGRESS = ("step", "window", "best_loss", "best_step", "no_better", "bad_steps", "validated_step")

FORM_SETTINGS = (
    "optimizer", "lora_dim", "lora_targets", "lora_kind", "train_bias", "train_top",
    "no_decay_bias", "lora_plus_ratio",
)  # fmt: skip


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
    header: dict
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
        header = run.header | {"step": run.step}
        checkpoint.save_adapter(run.adapter_path(name), run.kept, header)


def save(run: Run) -> None:
    """Write the adapter of this step, then the state from which the run can go on."""
    if run.saved == (run.step, run.validated_step):
        return
    run.saved, run.saved_at = (run.step, run.validated_step), time.monotonic()
    mine = {"generators": gpu.generator_states(), "meter": vars(run.average)}
    ranks = gpu.distributed_gather(run.args, mine)
    write_adapter(run, run.step)
    if run.args.rank == 0:
        state = {
            "format": checkpoint.FORMAT_VERSION,
            "header": run.header,
            "progress": {name: getattr(run, name) for name in PROGRESS},
            "trained": {name: p.detach() for name, p in run.kept.items()},
            "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(),
            "scaler": run.scaler.state_dict(),
            "ranks": ranks,
        }
        checkpoint.save_training_state(state_path(run.args.work_dir), state)
        _drop_old(run)


def _drop_old(run: Run) -> None:
    """Delete numbered adapters but the `--keep_last` newest up to this step."""
    if not run.args.keep_last:
        return
    names = [path.name for path in Path(run.args.work_dir).glob("model.*.safetensors")]
    numbered = [re.fullmatch(r"model\.(\d+)\.safetensors", name) for name in names]
    steps = sorted(int(match[1]) for match in numbered if match)
    done = [step for step in steps if step <= run.step]
    for step in done[: -run.args.keep_last]:
        run.adapter_path(step).unlink(missing_ok=True)


def state_path(work_dir: str | Path) -> Path:
    return Path(work_dir) / "state.pt"


def find_state(args: argparse.Namespace) -> dict | None:
    """The training state to go on from, None for a fresh start.

    Raises:
        InputError: there is a run and no `--resume`, or `--resume` and no run.
    """
    own = state_path(args.work_dir)
    path = own if args.resume in (None, "auto") else state_path(args.resume)
    if args.resume not in (None, "auto") and not path.is_file():
        raise InputError(f"--resume {args.resume} holds no state.pt; is it a run's work_dir?")
    goes_on_here = args.resume and path.resolve() == own.resolve()
    if not goes_on_here and (own.is_file() or own.with_name("run.json").is_file()):
        raise InputError(
            f"--work_dir {args.work_dir} holds a run already; give --resume auto to go on with it, "
            "or another --work_dir to start anew"
        )
    return checkpoint.read_training_state(path) if args.resume and path.is_file() else None


def check_equal_states(args: argparse.Namespace, state: dict | None) -> None:
    """Refuse to go on where the ranks found different states, or some none."""
    steps = gpu.distributed_gather(args, state["progress"]["step"] if state else 0)
    if len(set(steps)) > 1:
        raise InputError(
            f"--work_dir {args.work_dir} holds a state of step {steps[0]} for rank 0 and of step "
            f"{steps[args.rank]} for rank {args.rank}; it must be a folder that all machines share"
        )


def check_settings(state: dict, header: dict) -> None:
    """Refuse to go on with a run under settings, data or a base that would change its result."""
    then, now = _flat(state["header"]), _flat(header)
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if changed:
        first = changed[0]
        raise InputError(
            f"--resume: {', '.join(changed)} changed since the run was started ({first} was "
            f"{then.get(first)}, is {now.get(first)}); put it back, or give --resume_anyway"
        )


def _flat(header: dict) -> dict:
    nested = {key: value for key, value in header.items() if isinstance(value, dict)}
    flat = {key: value for key, value in header.items() if key not in nested}
    for key, value in nested.items():
        names = {name: name if key == "settings" else f"{key} {name}" for name in value}
        flat |= {names[name]: inner for name, inner in value.items()}
    return flat


def restore(run: Run, state: dict) -> None:
    """Put a run back to where `save` left it, under the settings of its own arguments."""
    _check_form(state, run.args)
    for name, value in state["progress"].items():
        setattr(run, name, value)
    run.saved = run.step, run.validated_step
    checkpoint.apply_trained(gpu.unwrap(run.model), state["trained"], "state.pt")
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
    _restore_schedule(run, state["scheduler"])
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    if len(state["ranks"]) == run.args.world_size:
        mine = state["ranks"][run.args.rank]
        gpu.set_generator_states(mine["generators"])
        vars(run.average).update(mine["meter"])


def _check_form(state: dict, args: argparse.Namespace) -> None:
    """Refuse what even `--resume_anyway` cannot do: the saved tensors are laid out for these."""
    then = state["header"]["settings"]
    for name in FORM_SETTINGS:
        if then.get(name) != getattr(args, name):
            raise InputError(
                f"--resume: --{name} was {then.get(name)} and is {getattr(args, name)}, which the "
                "saved state does not fit; put it back, or start anew in another --work_dir"
            )


def _restore_schedule(run: Run, saved: dict) -> None:
    """Put the schedule where it was, at the rate that the settings of this run give there."""
    scheduler = run.scheduler
    factors = [factor(run.step) for factor in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    now = {"base_lrs": scheduler.base_lrs, "_last_lr": rates}
    scheduler.load_state_dict(saved | now)
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
