"""Parameter groups, AdamW, and learning-rate schedules. Every schedule counts optimizer steps."""

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from common.errors import InputError

SCHEDULERS = ("linear", "cosine", "inv_sqrt", "constant", "cycle")
RECIPE_WARMUP = 500


@dataclass(frozen=True)
class OptimizerSettings:
    """What the optimizer and its schedule obey, each by the name of its flag. `max_step` are all
    steps of the run."""

    optimizer: str
    lr: float
    lora_plus_ratio: float
    weight_decay: float
    correct_bias: bool
    adam_epsilon: float
    adam_beta1: float
    adam_beta2: float
    no_decay_bias: bool
    scheduler: str
    warmup_step: int
    max_step: int
    i_steps: str
    i_lrs: str


def add_optimizer_params(parser: argparse.ArgumentParser) -> None:
    """Add the flags that the two factories below read; defaults are the E2E recipe."""
    add = parser.add_argument_group("optimizer").add_argument
    add(
        "--optimizer",
        choices=("original", "torch", "apex"),
        default="original",
        help="AdamW by the original's formula (default), PyTorch's, or NVIDIA apex's.",
    )
    add("--lr", type=float, default=2e-4, help="The peak learning rate. Default: 0.0002.")
    add(
        "--scheduler",
        default="linear",
        help=f"How the rate falls: {', '.join(SCHEDULERS)}. Default: linear.",
    )
    add(
        "--warmup_step",
        type=int,
        help=f"Steps in which the rate rises from 0. Default: {RECIPE_WARMUP}, or a tenth of the "
        "steps where that is less.",
    )
    add("--weight_decay", type=float, default=0.01, help="Decoupled decay. Default: 0.01.")
    add("--no_decay_bias", action="store_true", help="Biases and LayerNorm weights do not decay.")
    add(
        "--lora_plus_ratio",
        type=float,
        default=1,
        help="How many times the rate of A the rate of B is (LoRA+). Default: 1.",
    )
    add("--adam_epsilon", "--adam_epislon", type=float, default=1e-6, help="Default: 1e-6.")
    add("--adam_beta1", type=float, default=0.9, help="Default: 0.9.")
    add("--adam_beta2", type=float, default=0.999, help="Default: 0.999.")
    add(
        "--correct_bias",
        action="store_true",
        default=True,
        help="Adam's bias is corrected, which is the default.",
    )
    add("--no_correct_bias", dest="correct_bias", action="store_false", help="It is not corrected.")
    add("--i_steps", default="0", help="For cycle: comma-separated steps, from 0 up. Default: 0.")
    add("--i_lrs", default="0.00025", help="For cycle, which needs it: the rate at each of these.")


class AdamW(Optimizer):
    """Adam with decoupled weight decay, by the formula of the original LoRA experiments.

    Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, with two differences from
    `torch.optim.AdamW`: epsilon is added to √v before the bias correction, and the decay is taken
    from the parameter after its update:

        p ← p - lr · √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + ε);    p ← p - lr · λ · p

    With `capturable`, as in torch, nothing waits for the device: step numbers are tensors, and `lr`
    may be one. Where `found_inf`, a scalar tensor, is set and not 0, a step then changes nothing.
    All parameters of a group must have a gradient in the same steps.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update([p for p in group["params"] if p.grad is not None], group)
        return loss

    def _update(self, params: list[Tensor], group: dict) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                step = torch.zeros((), device=p.device) if group["capturable"] else 0
                self.state[p] = {"step": step, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        states = [self.state[p] for p in params]
        grads = [p.grad for p in params if p.grad is not None]  # all of them, as `step` chose them
        m, v = [s["m"] for s in states], [s["v"] for s in states]
        if self.found_inf is not None:
            skipped = self.found_inf > 0
            for gradient in grads:
                gradient.masked_fill_(skipped, 0)
        advance = self._advance_on_device if group["capturable"] else self._advance
        shrink_m, shrink_v, rates, shrink_p = advance(states, group)
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(m, shrink_m)
        torch._foreach_add_(m, grads, alpha=1 - beta1)
        torch._foreach_mul_(v, shrink_v)
        torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)
        denominators = torch._foreach_sqrt(v)
        torch._foreach_add_(denominators, group["eps"])
        if isinstance(rates, Tensor):  # which addcdiv does not take
            changes = torch._foreach_mul(m, rates)
            torch._foreach_div_(changes, denominators)
            torch._foreach_add_(params, changes)
        else:
            torch._foreach_addcdiv_(params, m, denominators, rates)
        if group["weight_decay"]:
            torch._foreach_mul_(params, shrink_p)

    def _advance(self, states: list[dict], group: dict) -> tuple[float, float, list[float], float]:
        """Count the step; return what m and v are multiplied by, the rate of each parameter, and
        what the parameters are multiplied by."""
        for state in states:
            state["step"] += 1
        rates = [-group["lr"] * _bias_correction(state["step"], group) for state in states]
        return *group["betas"], rates, 1 - group["lr"] * group["weight_decay"]

    def _advance_on_device(self, states: list[dict], group: dict) -> tuple[Tensor, ...]:
        """Do what `_advance` does, in scalar tensors, which change nothing if it is skipped."""
        steps = [state["step"] for state in states]
        skipped = torch.zeros_like(steps[0]) if self.found_inf is None else self.found_inf
        # A list, as _foreach_add_ would ask a single tensor for its number, and wait.
        torch._foreach_add_(steps, [1 - skipped] * len(steps))
        step = steps[0].double()
        beta1, beta2 = (torch.full_like(step, beta) for beta in group["betas"])
        rate = -group["lr"] * _bias_correction(step, group)
        decay = 1 - group["lr"] * group["weight_decay"] * torch.ones_like(step)
        unchanging = (beta1, 1), (beta2, 1), (rate, 0), (decay, 1)
        dtype = states[0]["m"].dtype
        return tuple(x.masked_fill(skipped > 0, value).to(dtype) for x, value in unchanging)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, whether its step numbers are tensors or not."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            on_device = group.setdefault("capturable", False)
            for p in group["params"]:
                if state := self.state.get(p):
                    step = int(state["step"])
                    state["step"] = (
                        torch.tensor(float(step), device=p.device) if on_device else step
                    )


def _bias_correction(step: int | Tensor, group: dict) -> Any:
    if not group["correct_bias"]:
        return 1.0
    beta1, beta2 = group["betas"]
    left = 1 - beta2**step
    return (left.sqrt() if isinstance(left, Tensor) else math.sqrt(left)) / (1 - beta1**step)


def create_grouped_parameters(
    model: nn.Module,
    weight_decay: float,
    no_decay_bias: bool,
    lr: float = 1e-3,
    lora_plus_ratio: float = 1,
) -> list[dict]:
    """The trainable parameters: with `no_decay_bias` split so that biases and LayerNorm weights
    have no decay, with a ratio other than 1 so that every B has `lora_plus_ratio` times the rate
    (LoRA+; Hayou et al. 2024, arXiv:2402.12354)."""
    groups = _groups_by_decay(model, weight_decay, no_decay_bias)
    if lora_plus_ratio == 1:
        return groups
    faster = {id(p) for name, p in model.named_parameters() if name.endswith("lora_B")}
    return [
        group | {"params": params, "lr": rate}
        for group in groups
        for is_b, rate in ((False, lr), (True, lr * lora_plus_ratio))
        if (params := [p for p in group["params"] if (id(p) in faster) == is_b])
    ]


def _groups_by_decay(model: nn.Module, weight_decay: float, no_decay_bias: bool) -> list[dict]:
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not no_decay_bias:
        return [{"params": [p for _, p in trainable], "weight_decay": weight_decay}]
    norms = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    exempt = [name.endswith("bias") or name in norms for name, _ in trainable]
    groups = [
        ([p for (_, p), out in zip(trainable, exempt, strict=True) if out == free], decay)
        for free, decay in ((False, weight_decay), (True, 0.0))
    ]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def create_adam_optimizer_from_args(
    model: nn.Module, settings: OptimizerSettings, skips_on_device: bool = False
) -> Optimizer:
    """Return the optimizer that `--optimizer` names, over the trainable parameters of `model`,
    which is on its device already; with `skips_on_device` it obeys its attribute `found_inf`.

    Raises:
        InputError: as `optimizer_class` does.
    """
    s, on_cuda = settings, any(p.is_cuda for p in model.parameters())
    kind = optimizer_class(s, on_cuda)
    own: dict[str, Any] = {
        "original": {"correct_bias": s.correct_bias, "capturable": skips_on_device},
        "torch": {"fused": on_cuda or skips_on_device},
    }
    return kind(
        create_grouped_parameters(model, s.weight_decay, s.no_decay_bias, s.lr, s.lora_plus_ratio),
        lr=s.lr,
        betas=(s.adam_beta1, s.adam_beta2),
        eps=s.adam_epsilon,
        weight_decay=s.weight_decay,
        **own.get(s.optimizer, {"adam_w_mode": True}),
    )


def optimizer_class(settings: OptimizerSettings, on_cuda: bool) -> Callable[..., Optimizer]:
    """Return what `--optimizer` names.

    Raises:
        InputError: apex is asked for and is not there, or there is no CUDA device for it; or the
            optimizer cannot leave the bias correction out.
    """
    if settings.optimizer == "original":
        return AdamW
    if not settings.correct_bias:
        raise InputError("--no_correct_bias goes with --optimizer original only")
    return torch.optim.AdamW if settings.optimizer == "torch" else _fused_adam(on_cuda)


def _fused_adam(on_cuda: bool) -> Callable[..., Optimizer]:
    """Return NVIDIA's FusedAdam. An unrelated package is called apex too, and fails in its own
    ways."""
    if not on_cuda:
        raise InputError("--optimizer apex needs a CUDA device; use --optimizer torch here")
    try:
        from apex.optimizers import FusedAdam
    except Exception as error:
        raise InputError(
            "--optimizer apex needs NVIDIA apex built from source (requirements.txt tells how); "
            f"importing it failed: {error}"
        ) from error
    return FusedAdam


def create_optimizer_scheduler(optimizer: Optimizer, settings: OptimizerSettings) -> LambdaLR:
    """Return the schedule that `--scheduler` names; call its `step()` once per optimizer step."""
    return LambdaLR(optimizer, rate_factor(settings))


def rate_factor(settings: OptimizerSettings) -> Callable[[int], float]:
    """Return the function by which step s, from 0 up, runs at lr · factor(s).

    Raises:
        InputError: there is no such schedule, or it does not fit the run's steps.
    """
    if settings.scheduler == "dev_perf":
        raise InputError("--scheduler dev_perf was never defined; use linear or another schedule")
    if settings.scheduler not in SCHEDULERS:
        raise InputError(
            f"--scheduler {settings.scheduler} is unknown; give one of {', '.join(SCHEDULERS)}"
        )
    if settings.scheduler == "cycle":
        return _cycle(settings.i_steps, settings.i_lrs, settings.lr)
    warmup, total = settings.warmup_step, settings.max_step
    if not 0 <= warmup < total:
        raise InputError(
            f"--warmup_step {warmup} must be at least 0 and below the {total} steps of the run"
        )
    decay = {
        "linear": lambda step: (total - step) / (total - warmup),
        "cosine": lambda step: 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total - warmup)),
        "inv_sqrt": lambda step: math.sqrt(max(warmup, 1) / max(step, 1)),
        "constant": lambda step: 1.0,
    }[settings.scheduler]
    return lambda step: step / warmup if step < warmup else decay(min(step, total))


def _cycle(i_steps: str, i_lrs: str, lr: float) -> Callable[[int], float]:
    """Return the factor that is linear between the points (step, learning rate) and constant after
    the last."""
    try:
        points = [int(step) for step in i_steps.split(",")]
        rates = [float(rate) for rate in i_lrs.split(",")]
    except ValueError as error:
        raise InputError(
            f"--i_steps and --i_lrs must be comma-separated numbers: {error}"
        ) from error
    rising = all(a < b for a, b in zip(points, points[1:], strict=False))
    usable = all(0 <= rate < math.inf for rate in rates)
    if len(points) != len(rates) or points[0] != 0 or not rising or not usable:
        raise InputError(
            f"--i_steps {i_steps} and --i_lrs {i_lrs} must have one rate, 0 or more, per step, and "
            "the steps must rise from 0"
        )

    return lambda step: float(np.interp(step, points, rates)) / lr
