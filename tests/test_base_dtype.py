"""--base_dtype: the frozen base rounded, everything that is trained in fp32."""

import json

import pytest
import torch
from conftest import METHODS, Tiny

import checkpoints
import gpt2_ft
import gpu
from common.errors import InputError
from methods import ADDITIONS
from training.run import Run
from training.setup import prepare


def make_run(tiny: Tiny, *more: object) -> Run:
    args = gpt2_ft.parse_args(tiny.argv("run", "--lora_dropout", 0, *more))
    return prepare(args, gpu.parse_gpu(args), tiny.folder / "run", None)


def bytes_of_base(run: Run) -> int:
    return sum(p.nbytes for p in run.model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("more", [[], ["--lora_kind", "dora"], ["--lora_targets", "all"]])
def test_a_rounded_base_trains_as_the_base_does_and_takes_half_the_memory(
    more: list, tiny: Tiny
) -> None:
    runs = [make_run(tiny, "--bf16", *flags, *more) for flags in ([], ["--base_dtype", "bf16"])]
    losses = []
    for run in runs:
        steps = run.sampler.steps(1)
        losses.append([gpt2_ft.optimizer_step(run, rows).loss for rows in steps])
        assert all(p.dtype == torch.float32 for p in run.trained.values())
        moments = (t for own in run.optimizer.state.values() for t in own.values())
        assert all(t.dtype == torch.float32 for t in moments if isinstance(t, torch.Tensor))
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    halved = {n: p for n, p in runs[1].model.named_parameters() if p.dtype == torch.bfloat16}
    assert {p.ndim for p in halved.values()} == {2} and "transformer.wte.weight" in halved
    whole = bytes_of_base(runs[0])
    assert bytes_of_base(runs[1]) == whole - sum(p.nbytes for p in halved.values())


def test_the_adapter_of_a_rounded_base_is_in_fp32_and_names_the_base_of_the_file(
    tiny: Tiny,
) -> None:
    flags = "--bf16", "--max_step", 3
    gpt2_ft.main(tiny.argv("plain", *flags))
    gpt2_ft.main(tiny.argv("rounded", *flags, "--base_dtype", "bf16"))
    plain, _ = checkpoints.read_adapter(tiny.folder / "plain" / "model.3.safetensors")
    rounded, tensors = checkpoints.read_adapter(tiny.folder / "rounded" / "model.3.safetensors")
    assert rounded.base == plain.base
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    then, now = (json.loads(json.dumps(header.settings)) for header in (plain, rounded))
    assert now == then | {"base_dtype": "bf16"}
    model, _ = checkpoints.load(tiny.base, tiny.folder / "rounded" / "model.3.safetensors")
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_resumed_run_must_hold_its_base_in_the_same_dtype(tiny: Tiny) -> None:
    gpt2_ft.main(tiny.argv("run", "--bf16", "--max_step", 3, "--scheduler", "constant"))
    with pytest.raises(InputError, match="base_dtype"):
        gpt2_ft.main(tiny.argv("run", "--bf16", "--resume", "auto", "--base_dtype", "bf16"))


@pytest.mark.parametrize("method", ADDITIONS)
def test_what_is_added_to_a_rounded_base_is_trained_in_fp32(method: str, tiny: Tiny) -> None:
    flags = [*METHODS[method], "--bf16", "--max_step", "3"]
    gpt2_ft.main(tiny.argv_of(flags, "plain"))
    gpt2_ft.main(tiny.argv_of(flags, "rounded", "--base_dtype", "bf16"))
    (_, plain), (_, rounded) = (
        checkpoints.read_adapter(tiny.folder / f"{name}:last") for name in ("plain", "rounded")
    )
    for name, tensor in plain.items():
        assert rounded[name].dtype == torch.float32
        assert (rounded[name] - tensor).abs().max() < 0.05


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bf16", "--lora_dim=0"], "--method full trains weights of the base"),
        (["--bf16", "--method", "bitfit"], "--method bitfit trains weights of the base"),
        (["--bf16", "--method", "top2"], "--method top2 trains weights of the base"),
        ([], "goes with --bf16, and this run computes in fp32; give both or neither"),
    ],
)
def test_a_base_that_is_trained_or_not_computed_with_in_halves_is_not_rounded(
    flags: list[str], message: str, tiny: Tiny
) -> None:
    with pytest.raises(InputError, match=message):
        gpt2_ft.main(tiny.argv_of(flags, "run", "--base_dtype", "bf16"))
