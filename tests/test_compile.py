"""--compile: the same losses, few compilations, and adapter files that say nothing of it."""

import shutil

import pytest
import torch
from conftest import METHODS, Tiny
from torch._dynamo.utils import counters

import gpt2_ft
import gpu
from checkpoints import read_adapter
from common.errors import InputError
from training import setup
from training.run import Run
from training.setup import prepare

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in inductor
needs_a_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="NOTHING IS COMPILED: there is no g++"
)


def make_run(tiny: Tiny, method: list[str], *more: object) -> Run:
    args = gpt2_ft.parse_args(tiny.argv_of(method, "run", *more))
    return prepare(args, gpu.parse_gpu(args), tiny.folder / "run", None)


@needs_a_compiler
@pytest.mark.parametrize("method", ["lora", "adapter_l", "adapter_h", "prefix"])
def test_compiled_blocks_have_the_losses_of_plain_ones_by_two_compilations_an_epoch(
    tiny: Tiny, method: str
) -> None:
    """All steps of an epoch, whose batches have any number of tokens, the last one fewer rows."""
    torch._dynamo.reset()
    counters.clear()
    losses = []
    for flags in ([], ["--compile"]):
        run = make_run(tiny, METHODS.get(method, ["--lora_dropout", "0"]), *flags)
        steps = run.sampler.steps(1)
        losses.append([gpt2_ft.optimizer_step(run, rows).smoothed_loss for rows in steps])
        gpt2_ft.evaluate(run.model, run.valid, run.runtime, 4)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert counters["stats"]["unique_graphs"] <= 2 and counters["frames"]["total"] <= 2


@needs_a_compiler
def test_adapters_of_compiled_and_plain_runs_take_each_others_place(tiny: Tiny) -> None:
    flags = "--lora_dropout", 0, "--scheduler", "constant"
    gpt2_ft.main(tiny.argv("plain", *flags, "--max_step", 6))
    gpt2_ft.main(tiny.argv("parts", *flags, "--max_step", 3, "--compile"))
    gpt2_ft.main(tiny.argv("parts", *flags, "--max_step", 6, "--resume", "auto", "--resume_anyway"))
    files = [
        read_adapter(tiny.folder / name / "model.6.safetensors") for name in ("plain", "parts")
    ]
    (header, tensors), (other_header, others) = files
    assert header == other_header and tensors.keys() == others.keys()
    assert all(torch.allclose(t, others[name], atol=1e-4) for name, t in tensors.items())


@pytest.mark.parametrize(
    ("device", "triton", "message"),
    [
        ("cpu", None, r"needs a C\+\+ compiler, and there is no no-such-compiler"),
        ("cuda", None, "needs triton"),
        ("cuda", "there", "needs a C compiler, and there is no gcc or clang"),
        ("mps", None, "for CPUs and CUDA"),
    ],
)
def test_without_a_compiler_nothing_begins(
    device: str, triton: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: triton)
    with pytest.raises(InputError, match=message):
        setup.check_compiler(torch.device(device))
