"""Steps that the device skips by itself, and that the loop hears of one step later: they end as
those that are looked at do, and nothing waits for the device."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import METHODS, Tiny
from safetensors.torch import load_file
from torch import Tensor
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import gpt2_ft
import gpu
import optimizer
from common.errors import InputError
from data_utils import EpochSampler, FT_Dataset
from training import setup
from training.resume import State
from training.run import Run
from training.updates import Arriving, DeferredUpdates

MICRO_BATCHES = 2  # of each step of the tiny run


def main(
    tiny: Tiny, work_dir: str, *more: object, deferred: bool = True, bad: set[int] = frozenset()
) -> Path:
    """A run with updates of one way or the other; those steps, from 0, are not finite."""

    def prepare(*arguments: object) -> Run:
        run = setup.prepare(*arguments)
        assert isinstance(run.updates, DeferredUpdates) == deferred
        spoil(run, bad)
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "defers", lambda *_: deferred)
        patch.setattr(gpt2_ft, "prepare", prepare)
        gpt2_ft.main(tiny.argv(work_dir, *more))
    return tiny.folder / work_dir


def spoil(run: Run, bad: set[int]) -> None:
    """Make the loss of some steps infinite."""
    real, calls = run.model.forward, iter(range(10**6))

    def forward(*inputs: object, **settings: object) -> tuple:
        plain, loss = real(*inputs, **settings)
        training = run.model.training and next(calls) // MICRO_BATCHES in bad
        return plain, loss * math.inf if training else loss

    run.model.forward = forward


def content(work_dir: Path) -> tuple[dict[str, bytes], str, list]:
    """All adapters, the log without times, and the last state's tensors and counts."""
    adapters = {path.name: path.read_bytes() for path in work_dir.glob("*.safetensors")}
    state = State.read(work_dir / "state.pt")
    moments = [
        [int(value) if name == "step" else value.tolist() for name, value in sorted(own.items())]
        for own in state.optimizer["state"].values()
    ]
    rates = [group["lr"] for group in state.optimizer["param_groups"]]
    lines = (work_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [line.split('"tokens_per_second"')[0] for line in lines]
    return adapters, "\n".join(log), [moments, rates, state.progress, state.scheduler["last_epoch"]]


BAD = [set(), {0}, {0, 1, 2}, {3}, {2, 4, 5}, {5}, {10, 11}]
FLAGS = [
    [],
    ["--lora_plus_ratio", 8, "--no_correct_bias", "--clip", 0.1, "--scheduler", "cosine"],
    ["--log_interval", 5, "--eval_interval", 99, "--save_interval", 99, "--lora_dim", 0],
]


@pytest.mark.parametrize("more", FLAGS)
@pytest.mark.parametrize("bad", BAD)
def test_deferred_updates_end_with_the_bytes_of_checked_ones(
    bad: set[int], more: list, tiny: Tiny
) -> None:
    checked = main(tiny, "checked", *more, deferred=False, bad=bad)
    deferred = main(tiny, "deferred", *more, bad=bad)
    assert content(deferred) == content(checked)


def test_deferred_updates_of_torchs_optimizer_are_those_it_takes_when_checked(tiny: Tiny) -> None:
    flags = ["--optimizer", "torch", "--lora_dropout", 0]
    checked = main(tiny, "checked", *flags, deferred=False, bad={0, 3, 4})
    deferred = main(tiny, "deferred", *flags, bad={0, 3, 4})
    name = "model.9.safetensors"
    expected = load_file(checked / name)
    assert all(
        torch.allclose(t, expected[k], atol=1e-6) for k, t in load_file(deferred / name).items()
    )
    assert State.read(deferred / "state.pt").progress == State.read(checked / "state.pt").progress


class FusedAdam(torch.optim.AdamW):
    """torch's AdamW with the methods of NVIDIA's."""

    def __init__(self, *arguments: object, adam_w_mode: bool, **settings: object) -> None:
        assert adam_w_mode
        super().__init__(*arguments, **settings)

    def zero_grad(self) -> None:
        super().zero_grad()


def test_a_run_calls_the_optimizer_of_apex_as_it_can_be_called(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "_fused_adam", lambda on_cuda: FusedAdam)
    flags = "--lora_dropout", 0, "--max_step", 3
    found = main(tiny, "apex", *flags, "--optimizer", "apex", deferred=False)
    expected = main(tiny, "torch", *flags, "--optimizer", "torch", deferred=False)
    name = "model.3.safetensors"
    ours, theirs = load_file(found / name), load_file(expected / name)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("first", [True, False])
def test_a_run_resumes_whichever_way_its_updates_were_taken(first: bool, tiny: Tiny) -> None:
    flags = "--scheduler", "constant"
    main(tiny, "whole", *flags, deferred=False, bad={1})
    main(tiny, "parts", *flags, "--max_step", 5, deferred=first, bad={1})
    flags += "--resume", "auto", "--resume_anyway"
    last = main(tiny, "parts", *flags, deferred=not first) / "model.11.safetensors"
    assert last.read_bytes() == (tiny.folder / "whole" / last.name).read_bytes()


def test_too_many_bad_steps_end_a_deferred_run_and_name_the_last_good_file(tiny: Tiny) -> None:
    flags = "--max_bad_steps", 3, "--save_interval", 1
    messages = []
    for deferred in (False, True):
        with pytest.raises(InputError, match="3 steps in a row.*model.3.safetensors") as error:
            main(tiny, "run", *flags, deferred=deferred, bad=set(range(4, 99)))
        messages.append(str(error.value))
        (tiny.folder / "run").rename(tiny.folder / f"run{deferred}")
    assert messages[0] == messages[1]


def test_a_deferred_run_obeys_a_signal_and_resumes_to_the_same_bytes(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--log_interval", 50, "--eval_interval", 50, "--save_interval", 50
    whole = main(tiny, "whole", *flags)
    real, calls = gpt2_ft.optimizer_step, iter(range(99))

    def signalled(run: Run, rows: list) -> object:
        run.signal = 15 if next(calls) == 2 else run.signal
        return real(run, rows)

    with monkeypatch.context() as patch:
        patch.setattr(gpt2_ft, "optimizer_step", signalled)
        with pytest.raises(SystemExit) as end:
            main(tiny, "parts", *flags)
    assert end.value.code == 143 and next(calls) < 6
    main(tiny, "parts", *flags, "--resume", "auto")
    assert (
        content(tiny.folder / "parts")[0]["model.12.safetensors"]
        == (whole / "model.12.safetensors").read_bytes()
    )


class NoWaiting(TorchDispatchMode):
    """Fails on operations whose result, or its shape, the host has to wait for."""

    FORBIDDEN = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, name
        if name in ("index", "index_put", "index_put_"):
            keys = [key for key in args[1] if key is not None]
            assert all(key.dtype == torch.int64 for key in keys), "a boolean index"
        return func(*args, **(kwargs or {}))


READS = ("tolist", "numpy", "item", "__bool__", "__float__", "__int__", "__index__", "cpu")


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Fail within the block on any reading of a tensor but of what has arrived on the host, and on
    what is made there of the data files."""
    allowed = 0

    def exempt(function: Callable) -> Callable:
        def call(*arguments: object) -> object:
            nonlocal allowed
            allowed += 1
            with _disable_current_modes():
                result = function(*arguments)
            allowed -= 1
            return result

        return call

    def guard(name: str) -> Callable:
        real = getattr(Tensor, name)

        def read(self: Tensor, *arguments: object) -> object:
            assert allowed, f"Tensor.{name} waits for the device"
            return real(self, *arguments)

        return read

    with pytest.MonkeyPatch.context() as patch, NoWaiting():
        for name in READS:
            patch.setattr(Tensor, name, guard(name))
        patch.setattr(Arriving, "read", exempt(Arriving.read))
        patch.setattr(FT_Dataset, "batch", exempt(FT_Dataset.batch))
        steps = exempt(lambda *arguments: list(real_steps(*arguments)))
        patch.setattr(EpochSampler, "steps", lambda self, epoch, start=0: steps(self, epoch, start))
        yield


real_steps = EpochSampler.steps


def train_guarded(
    tiny: Tiny, method: list[str], *more: object, deferred: bool = True, scaled: bool = False
) -> Run:
    """One epoch of 21 steps in which nothing may wait, without validation and saves."""
    flags = [
        "--train_batch_size", 1, "--grad_acc", 1, "--clip", 0.1, "--log_interval", 7,
        "--eval_interval", 99, "--save_interval", 99, "--seq_len", 29, *more,
    ]  # fmt: skip
    args = gpt2_ft.parse_args(tiny.argv_of(method, "run", *flags))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "defers", lambda *_: deferred)
        run = setup.prepare(args, gpu.parse_gpu(args), tiny.folder / "run", None)
        run.scaler = GradScaler("cpu", enabled=scaled)
        patch.setattr(gpt2_ft, "validate", lambda *_: None)
        patch.setattr(gpt2_ft, "save", lambda *_: None)
        with nothing_waits():
            gpt2_ft.train_validate(run, 1)
    return run


OF_LORA = {"lora": ["--lora_dim=2"], "dora": ["--lora_kind=dora", "--lora_targets=all"]}


@pytest.mark.parametrize("optimizer", ["original", "torch"])
@pytest.mark.parametrize("method", [*OF_LORA, *METHODS])
def test_nothing_in_twenty_deferred_steps_waits_for_the_device(
    method: str, optimizer: str, tiny: Tiny
) -> None:
    flags = "--optimizer", optimizer
    run = train_guarded(tiny, (OF_LORA | METHODS)[method], *flags, scaled=method == "dora")
    assert (run.step, len(run.outstanding)) == (21, 0)


def test_checked_steps_wait_and_the_guard_sees_it(tiny: Tiny) -> None:
    with pytest.raises(AssertionError, match="waits for the device"):
        train_guarded(tiny, [], deferred=False)


@pytest.mark.parametrize(
    "way",
    [
        float,
        bool,
        lambda t: t.tolist(),
        torch.nonzero,
        lambda t: t[t > 0],
        lambda t: torch.full_like(t, t),
    ],
)
def test_the_guard_sees_each_way_to_wait(way: Callable) -> None:
    with pytest.raises(AssertionError), nothing_waits():
        way(torch.ones(()))
