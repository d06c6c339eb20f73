"""AdamW's formula, its groups, and the schedules."""

import argparse
import builtins
import math
import sys
import types
import warnings

import pytest
import torch
from conftest import TINY_CARD
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loralib as lora
from common.errors import InputError
from model import GPT2Config, GPT2LMModel
from optimizer import (
    SCHEDULERS,
    AdamW,
    OptimizerSettings,
    add_optimizer_params,
    create_adam_optimizer_from_args,
    create_grouped_parameters,
    create_optimizer_scheduler,
)


def arguments(*argv: str, max_step: int = 100) -> OptimizerSettings:
    parser = argparse.ArgumentParser()
    add_optimizer_params(parser)
    return OptimizerSettings(**vars(parser.parse_args(argv)), max_step=max_step)


def original_update(values: list[float], gradients: list[list[float]], **h: float) -> list[float]:
    """The design's formula number by number: epsilon beside the uncorrected root of v, decay last.

    p = p - lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps), then p = p - lr * decay * p.
    """
    first, second = [0.0] * len(values), [0.0] * len(values)
    values = list(values)
    for t, gradient in enumerate(gradients, start=1):
        rate = h["lr"]
        if h["correct_bias"]:
            rate *= math.sqrt(1 - h["beta2"] ** t) / (1 - h["beta1"] ** t)
        for i, g in enumerate(gradient):
            first[i] = h["beta1"] * first[i] + (1 - h["beta1"]) * g
            second[i] = h["beta2"] * second[i] + (1 - h["beta2"]) * g * g
            values[i] -= rate * first[i] / (math.sqrt(second[i]) + h["eps"])
            values[i] -= h["lr"] * h["decay"] * values[i]
    return values


def run_optimizer(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradients: list[list[float]]
) -> list[float]:
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=parameter.dtype)
        optimizer.step()
    return parameter.detach().tolist()


GRADIENTS = st.lists(
    st.lists(st.floats(1e-3, 1e-1) | st.floats(-1e-1, -1e-3), min_size=3, max_size=3),
    min_size=1,
    max_size=20,
)


@settings(max_examples=100, deadline=None)
@given(
    gradients=GRADIENTS,
    correct_bias=st.booleans(),
    decay=st.sampled_from([0.0, 0.01, 0.5]),
    eps=st.sampled_from([1e-8, 1e-6, 1e-2]),
    beta1=st.sampled_from([0.0, 0.9]),
)
def test_update_is_the_designs_formula(
    gradients: list, correct_bias: bool, decay: float, eps: float, beta1: float
) -> None:
    start = [0.5, -1.0, 2.0]
    parameter = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = AdamW([parameter], 0.01, (beta1, 0.999), eps, decay, correct_bias)
    expected = original_update(
        start, gradients, lr=0.01, beta1=beta1, beta2=0.999, eps=eps, decay=decay,
        correct_bias=correct_bias,
    )  # fmt: skip
    assert run_optimizer(optimizer, parameter, gradients) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(gradients=GRADIENTS)
def test_update_is_torchs_where_epsilon_and_decay_vanish_and_not_elsewhere(gradients: list) -> None:
    def both(eps: float) -> float:
        results = []
        for kind in (AdamW, torch.optim.AdamW):
            parameter = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
            optimizer = kind([parameter], lr=0.01, eps=eps, weight_decay=0.0)
            results.append(torch.tensor(run_optimizer(optimizer, parameter, gradients)))
        return float((results[0] - results[1]).abs().max())

    assert both(1e-16) < 1e-9
    assert both(1e-2) > 1e-6


def test_parameters_without_gradient_stay_and_keep_no_state() -> None:
    used, unused = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = AdamW([used, unused], lr=0.1, weight_decay=0.1)
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert unused not in optimizer.state
    assert not torch.equal(used, torch.ones(2))


def test_an_optimizer_goes_on_from_its_state() -> None:
    gradients = [[0.1, -0.2, 0.3]] * 6
    whole = nn.Parameter(torch.ones(3))
    expected = run_optimizer(AdamW([whole], lr=0.1), whole, gradients)
    parameter = nn.Parameter(torch.ones(3))
    first = AdamW([parameter], lr=0.1)
    run_optimizer(first, parameter, gradients[:3])
    second = AdamW([parameter], lr=0.7)
    second.load_state_dict(first.state_dict())
    assert run_optimizer(second, parameter, gradients[3:]) == expected


def test_step_calls_its_closure_with_gradients_on() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = AdamW([parameter], lr=0.1)

    def closure() -> torch.Tensor:
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 1
    assert parameter < 1


def test_norms_and_biases_have_no_decay_when_asked_for_and_frozen_ones_no_group() -> None:
    gpt = GPT2LMModel(GPT2Config(64, 32, **TINY_CARD))
    names = {id(p): name for name, p in gpt.named_parameters()}
    decayed, exempt = (
        {names[id(p)] for p in group["params"]}
        for group in create_grouped_parameters(gpt, 0.3, no_decay_bias=True)
    )
    assert decayed | exempt == set(names.values())
    assert exempt == {n for n in names.values() if n.endswith("bias") or ".ln_" in n}
    assert len([n for n in exempt if ".ln_" in n and n.endswith("weight")]) == 5

    (everything,) = create_grouped_parameters(gpt, 0.3, no_decay_bias=False)
    assert everything["weight_decay"] == 0.3
    assert len(everything["params"]) == len(names)

    adapted = GPT2LMModel(GPT2Config(64, 32, **TINY_CARD, lora_attn_dim=2))
    lora.mark_only_lora_as_trainable(adapted)
    (pairs,) = create_grouped_parameters(adapted, 0.3, no_decay_bias=True)
    assert len(pairs["params"]) == 4


def tiny_layer() -> nn.Module:
    return nn.Linear(2, 2)


@pytest.mark.parametrize("name, kind", [("original", AdamW), ("torch", torch.optim.AdamW)])
def test_optimizer_flag_chooses_the_optimizer_with_the_given_settings(
    name: str, kind: type
) -> None:
    args = arguments("--optimizer", name, "--lr", "0.3", "--adam_epislon", "0.1")
    optimizer = create_adam_optimizer_from_args(tiny_layer(), args)
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["eps"], group["betas"]) == (0.3, 0.1, (0.9, 0.999))
    assert group["weight_decay"] == 0.01


def test_correct_bias_is_on_unless_switched_off_and_only_the_originals() -> None:
    for argv, expected in (
        ([], True),
        (["--correct_bias"], True),
        (["--no_correct_bias"], False),
    ):
        optimizer = create_adam_optimizer_from_args(tiny_layer(), arguments(*argv))
        assert optimizer.param_groups[0]["correct_bias"] is expected
    with pytest.raises(InputError, match="no_correct_bias"):
        create_adam_optimizer_from_args(
            tiny_layer(), arguments("--optimizer", "torch", "--no_correct_bias")
        )


def test_apex_needs_cuda() -> None:
    with pytest.raises(InputError, match="apex needs a CUDA device"):
        create_adam_optimizer_from_args(tiny_layer(), arguments("--optimizer", "apex"))


def test_the_unrelated_apex_package_is_told_from_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both where apex is absent and where another package of that name fails as it is imported."""
    args = arguments("--optimizer", "apex")
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)
    for module in ({"apex": None}, {"apex": types.ModuleType("apex"), "apex.optimizers": None}):
        for name, value in module.items():
            monkeypatch.setitem(sys.modules, name, value)
        with pytest.raises(InputError, match="built from source"):
            create_adam_optimizer_from_args(tiny_layer(), args)

    imported = builtins.__import__

    def broken_import(name: str, *rest: object) -> object:
        if name.startswith("apex"):
            raise ValueError("no session key")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken_import)
    with pytest.raises(InputError, match="no session key"):
        create_adam_optimizer_from_args(tiny_layer(), args)


def rates(args: OptimizerSettings) -> list[float]:
    """The learning rate of each step from 0 to `max_step`, driven as training drives it."""
    optimizer = create_adam_optimizer_from_args(tiny_layer(), args)
    scheduler = create_optimizer_scheduler(optimizer, args)
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(args.max_step + 1):
            values.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return values


def schedule(name: str, *argv: str, warmup: int = 500, total: int = 1000) -> list[float]:
    more = ["--scheduler", name, "--warmup_step", str(warmup), "--lr", "1", *argv]
    return rates(arguments(*more, max_step=total))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "cycle"])
def test_warmup_rises_by_equal_steps_to_the_peak(name: str) -> None:
    values = schedule(name)
    assert values[:501] == pytest.approx([step / 500 for step in range(501)])
    assert max(values) == values[500] == 1


@pytest.mark.parametrize(
    "name, points",
    [
        ("linear", {750: 0.5, 1000: 0.0, 999: 0.002}),
        ("cosine", {499: 0.998, 750: 0.5, 1000: 0.0, 625: 0.5 + 0.5 * math.cos(math.pi / 4)}),
        ("constant", {501: 1.0, 1000: 1.0}),
        ("inv_sqrt", {1000: math.sqrt(0.5)}),
    ],
)
def test_schedules_have_their_values_behind_warmup(name: str, points: dict[int, float]) -> None:
    values = schedule(name)
    assert {step: values[step] for step in points} == pytest.approx(points)


def test_inv_sqrt_halves_from_warmup_to_four_times_its_steps() -> None:
    values = schedule("inv_sqrt", total=2000)
    assert values[2000] == pytest.approx(values[500] / 2)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "cycle"])
def test_without_warmup_the_first_step_has_the_whole_rate(name: str) -> None:
    assert schedule(name, warmup=0, total=10)[0] == 1


def test_cycle_is_linear_between_its_points_and_constant_behind() -> None:
    values = schedule("cycle", "--i_steps", "0,4,8", "--i_lrs", "0.1,0.5,0.2", total=12)
    expected = [0.1, 0.2, 0.3, 0.4, 0.5, 0.425, 0.35, 0.275, 0.2, 0.2, 0.2, 0.2, 0.2]
    assert values == pytest.approx(expected)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--scheduler", "dev_perf"], "dev_perf was never defined"),
        (["--scheduler", "noam"], "noam is unknown.*linear, cosine"),
        (["--warmup_step", "100"], "warmup_step 100 .* below the 100 steps"),
        (["--warmup_step", "-1"], "warmup_step -1"),
        (["--scheduler", "cycle", "--i_steps", "0,x", "--i_lrs", "1"], "comma-separated numbers"),
        (
            ["--scheduler", "cycle", "--i_steps", "0,5", "--i_lrs", "1"],
            "one rate, 0 or more, per step",
        ),
        (["--scheduler", "cycle", "--i_steps", "1", "--i_lrs", "1"], "rise from 0"),
        (["--scheduler", "cycle", "--i_steps", "0,5,5", "--i_lrs", "1,1,1"], "rise from 0"),
        (["--scheduler", "cycle", "--i_lrs", "nan"], "i_lrs nan"),
        (["--scheduler", "cycle", "--i_lrs", "-1"], "i_lrs -1"),
    ],
)
def test_schedules_that_make_no_sense_are_refused_with_the_values(
    argv: list[str], message: str
) -> None:
    args = arguments(*argv)
    optimizer = create_adam_optimizer_from_args(tiny_layer(), args)
    with pytest.raises(InputError, match=message):
        create_optimizer_scheduler(optimizer, args)
