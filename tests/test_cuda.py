"""What only a GPU can show. Run these first on a machine that has one."""

import json
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import Tiny, finish, start

import gpt2_ft
import gpu
from common import packed_attention
from common.batch import Spans
from decoding.beam_search import SearchSettings, beam_search
from decoding.cache import DecodeCache
from model import Attention, GPT2Config, GPT2LMModel
from training import graphs
from training.setup import prepare

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOTHING ABOUT GPUS IS TESTED: there is no CUDA device"
)
CPU_LOSSES: dict[tuple[str, ...], list[float]] = {}  # by flags: every test has the same files
SETTINGS = ("--lora_dropout=0", "--log_interval=1", "--max_step=6", "--valid_samples=0")


def losses(nano: Tiny, work_dir: str, *flags: str) -> list[float]:
    """Of a run in a process of its own: what --deterministic sets is read once and stays."""
    process = start(["gpt2_ft.py", *nano.argv(work_dir), *SETTINGS, *flags])
    code, _, err = finish(process, timeout=300)  # a compilation may take most of it
    assert code == 0, err
    lines = (nano.folder / work_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"]


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        ((), 1e-3),
        (("--optimizer=torch",), 1e-3),
        (("--deterministic",), 1e-3),
        (("--bf16",), 5e-2),
        (("--fp16",), 5e-2),
        (("--bf16", "--base_dtype=bf16"), 5e-2),
        (("--fp16", "--base_dtype=fp16"), 5e-2),
        (("--compile",), 1e-3),
        (("--bf16", "--compile", "--gradient_checkpointing"), 5e-2),
        (("--bf16", "--cuda_graphs"), 5e-2),
        (("--fp16", "--cuda_graphs", "--compile"), 5e-2),
    ],
)
def test_losses_on_a_gpu_are_those_of_a_cpu(
    nano: Tiny, flags: tuple[str, ...], tolerance: float
) -> None:
    own = tuple(flag for flag in flags if flag.startswith("--optimizer"))
    if own not in CPU_LOSSES:
        CPU_LOSSES[own] = losses(nano, "cpu", "--device=cpu", *own)
    found = losses(nano, "gpu", "--device=cuda", *flags)
    assert found == pytest.approx(CPU_LOSSES[own], abs=tolerance)


@pytest.fixture
def forbidding_waits():
    """A function that lets any operation raise that makes the host wait for the GPU."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["original", "torch"])
@pytest.mark.parametrize("precision", [(), ("--bf16",), ("--fp16",)])
def test_no_step_waits_for_the_gpu(
    precision: tuple[str, ...],
    optimizer: str,
    tiny: Tiny,
    forbidding_waits: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--clip", 0.1, "--log_interval", 5, "--optimizer", optimizer, *precision]
    args = gpt2_ft.parse_args(tiny.argv("run", *flags, "--device", "cuda"))
    run = prepare(args, gpu.parse_gpu(args), tiny.folder / "run", None)
    for name in ("validate", "save"):
        monkeypatch.setattr(gpt2_ft, name, lambda *_: None)
    gpt2_ft.train_validate(run, 1)  # libraries start
    forbidding_waits()
    gpt2_ft.train_validate(run, 2)
    assert run.batches_taken == 12 and not run.outstanding


@pytest.mark.parametrize("method", [["--lora_dim=2", "--lora_dropout=0.5"], ["--method=full"]])
@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_replayed_steps_are_those_that_are_not(
    precision: str, method: list[str], nano: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of one size, as they are filled up that far; dropout draws the same numbers."""
    flags = [precision, "--device", "cuda", "--cuda_graphs"]
    losses = []
    for most in (0, 128):
        monkeypatch.setattr(graphs, "MOST", most)
        monkeypatch.setattr(graphs, "MULTIPLE", 512)
        args = gpt2_ft.parse_args(nano.argv_of(method, "run", *flags))
        run = prepare(args, gpu.parse_gpu(args), nano.folder / "run", None)
        steps = [*run.sampler.steps(1), *run.sampler.steps(2)]
        losses.append([gpt2_ft.optimizer_step(run, rows).loss for rows in steps])
        assert bool(run.graphs.recorded) == bool(most)
    assert losses[1] == pytest.approx(losses[0], abs=1e-3) and len(set(losses[0])) > 6


@pytest.mark.parametrize("dtype", packed_attention.HALVES)
@pytest.mark.parametrize("lengths", [[5, 1, 70], [129, 128, 1, 3], [64, 64]])
def test_packed_attention_and_its_gradients_are_those_of_padded_rows(
    lengths: list[int], dtype: torch.dtype
) -> None:
    attention = Attention(GPT2Config(n_embd=256, n_head=4))
    torch.manual_seed(0)
    fused = torch.randn(sum(lengths), 768, device="cuda", dtype=dtype, requires_grad=True)
    if not packed_attention.is_possible(fused, 64):
        pytest.skip("torch has no packed attention for this GPU")
    spans = Spans.of(lengths).to(fused.device)
    mixed = attention.attend_packed(fused, spans), attention.attend_padded(fused, spans)
    weights = torch.randn_like(mixed[0])
    grads = [torch.autograd.grad((m * weights).sum(), fused)[0] for m in mixed]
    for packed, padded in (mixed, grads):
        torch.testing.assert_close(packed, padded, atol=2e-2, rtol=2e-2)


def test_a_run_on_a_gpu_resumes_with_its_dropout(nano: Tiny) -> None:
    flags = ("--device=cuda", "--deterministic", "--lora_dropout=0.5", "--scheduler=constant")
    whole = losses(nano, "whole", *flags)
    losses(nano, "parts", *flags, "--max_step=3")
    parts = losses(nano, "parts", *flags, "--resume=auto", "--resume_anyway")
    assert parts == pytest.approx(whole, abs=1e-6)


def test_logits_and_steps_of_decoding_on_a_gpu_are_those_of_a_cpu() -> None:
    torch.manual_seed(0)
    model = GPT2LMModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    prompts = torch.randint(64, (20,)).split([9, 4, 7])
    tokens = torch.randint(64, (3, 2))
    found = []
    for device in ("cpu", "cuda"):
        model.to(device)
        with torch.no_grad():
            cache = DecodeCache([9, 4, 7], torch.device(device))
            logits = model.prefill([prompt.to(device) for prompt in prompts], cache)
            cache.reorder(torch.zeros(3, 2, dtype=torch.int64, device=device))
            found.append((logits.cpu(), model.decode_step(tokens.to(device), cache).cpu()))
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cuda, cpu, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("search", ["original", "hf"])
def test_decoding_a_token_waits_for_the_gpu_once(search: str) -> None:
    """And now and then to see how much of the cache is in use."""
    torch.manual_seed(0)
    model = GPT2LMModel(GPT2Config(vocab_size=4096, n_embd=32, n_layer=2, n_head=4)).cuda().eval()
    prompts = [torch.randint(4096, (n,), device="cuda") for n in (9, 4, 7)]
    counts = []
    for length in (20, 20, 40):  # libraries start in the first
        rules = {"beam": 4, "eval_len": length, "min_length": length, "end_ids": (3, 5)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            beam_search(model, prompts, SearchSettings(search=search, **rules))
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("called a synchronizing" in str(own.message) for own in caught))
    assert 20 <= counts[2] - counts[1] <= 27
