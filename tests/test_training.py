"""One step and one epoch: weighting, accumulation, clipping, bad steps, validation, the oracle."""

import hashlib
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Tiny, random_rows, refusal, through_a_pipe, write_rows
from safetensors.torch import load_file
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils.rnn import pad_sequence

import checkpoints
import gpt2_ft
import gpu
import loralib as lora
from checkpoints.base import canonical_name
from common.errors import InputError
from data.convert_e2e import e2e_rows
from data_utils import EpochSampler, FT_Dataset, load_tokenizer
from model import GPT2Config, GPT2LMModel
from optimizer import OptimizerSettings, create_adam_optimizer_from_args, create_optimizer_scheduler
from training.resume import State
from training.run import Run
from training.setup import from_flags, prepare

FOLDERS = (".", "loralib", "common", "checkpoints", "training", "decoding", "data", "eval")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in (*FOLDERS, "experiments")
    for path in (ROOT / folder).glob("*.py")
)


def test_losses_and_adapter_equal_the_oracles_over_50_steps(shared: Path, tmp_path: Path) -> None:
    oracle = json.loads((shared / "oracle" / "train.json").read_text(encoding="utf-8"))
    rows = write_rows(tmp_path / "valid.jsonl", list(e2e_rows(shared / "data/e2e/valid.txt")))
    data = FT_Dataset(rows, 128, tokenizer=load_tokenizer(shared / "data" / "gpt2_vocab"))
    steps = EpochSampler(len(data), 8, seed=110).steps(1)
    batches = [micro for (micro,), _ in zip(steps, range(50), strict=False)]
    assert batches == oracle["ids"]

    base = load_file(shared / "oracle" / "nano_random.safetensors")
    positions = base["wpe.weight"].size(0)
    shape = {"n_positions": positions, "n_embd": 64, "n_layer": 2, "n_head": 2}
    gpt = GPT2LMModel(GPT2Config(**shape, lora_attn_dim=4, lora_attn_alpha=32))
    checkpoints.load_weights(gpt, base)
    saved = load_file(shared / "oracle" / "nano_train_lora.safetensors")

    def adapter(moment: str) -> dict[str, Tensor]:
        keys = [key for key in saved if key.startswith(moment)]
        return {canonical_name(key.removeprefix(moment)): saved[key] for key in keys}

    checkpoints.apply_trained(gpt, adapter("lora_init."), "lora_init")
    lora.mark_only_lora_as_trainable(gpt)
    given = oracle["optimizer"]
    argv = ["--train_data", "x", "--init_checkpoint", "x"]
    for name in ("lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_epislon", "warmup_step"):
        argv += [f"--{name}", str(given[name])]
    argv += ["--max_step", str(given["max_step"])]
    optimizer_settings = from_flags(OptimizerSettings, gpt2_ft.parse_args(argv))
    adam = create_adam_optimizer_from_args(gpt, optimizer_settings)
    scheduler = create_optimizer_scheduler(adam, optimizer_settings)
    for micro, loss, norm in zip(batches, oracle["losses"], oracle["grad_norms"], strict=True):
        batch = data.batch(micro)
        _, ours = gpt(batch, label_smooth=oracle["label_smooth"])
        ours = ours * (batch.count / (batch.count + 1e-4))  # the original's denominator
        assert abs(float(ours.detach()) - loss) < 1e-5
        ours.backward()
        gradients = [p.grad for p in gpt.parameters() if p.grad is not None]
        assert abs(float(torch.nn.utils.get_total_norm(gradients)) - norm) < 1e-4
        adam.step()
        scheduler.step()
        adam.zero_grad()
    final = dict(gpt.named_parameters())
    for name, tensor in adapter("lora_final.").items():
        assert (final[name].detach() - tensor).abs().max() < 1e-5, name


def padded(data: FT_Dataset, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and mask of some rows, (B, T) each: the form in which a user gives a batch."""
    items = [data[row] for row in rows]
    columns = (
        [torch.from_numpy(item[key]) for item in items] for key in ("input", "target", "mask")
    )
    ids, labels, mask = (pad_sequence(column, batch_first=True) for column in columns)
    return ids, labels, mask


def make_run(tiny: Tiny, *more: object) -> Run:
    """A run on the tiny data, without dropout and warm-up, ready for its first step."""
    argv = tiny.argv("run", "--lora_dropout", 0, "--warmup_step", 0, *more)
    args = gpt2_ft.parse_args(argv)
    return prepare(args, gpu.parse_gpu(args), tiny.folder / "run", None)


def randomize_adapter(run: Run) -> None:
    """Away from B = 0, where A has no gradient."""
    torch.manual_seed(11)
    with torch.no_grad():
        for tensor in run.trained.values():
            tensor.normal_(std=0.2)


def step_gradients(run: Run, rows: list[list[int]]) -> dict[str, Tensor]:
    """Gradients as the optimizer sees them."""
    seen = {}

    def look(*_: object) -> None:
        seen.update({name: p.grad.clone() for name, p in run.trained.items()})

    hook = run.optimizer.register_step_pre_hook(look)
    gpt2_ft.optimizer_step(run, rows)
    hook.remove()
    return seen


def test_gradient_of_four_rows_is_that_of_four_micro_batches_of_one(tiny: Tiny) -> None:
    rows = [{"context": [1, 2, 3], "completion": list(range(1, n + 1))} for n in (5, 10, 6, 7)]
    write_rows(tiny.folder / "train.jsonl", rows)
    together, apart = make_run(tiny), make_run(tiny)
    for run in (together, apart):
        randomize_adapter(run)
    whole = step_gradients(together, [[0, 1, 2, 3]])
    micro = step_gradients(apart, [[0], [1], [2], [3]])

    fresh = make_run(tiny)
    randomize_adapter(fresh)
    ids, labels, mask = padded(fresh.train, [0, 1, 2, 3])
    logits, _ = fresh.model(ids)
    F.cross_entropy(logits[mask > 0], labels[mask > 0], label_smoothing=0.1).backward()
    for name, parameter in fresh.trained.items():
        assert parameter.grad.abs().max() > 0
        for gradients in (whole, micro):
            error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-5, name


def test_a_step_reports_the_token_mean_and_the_norm_before_clipping(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tiny, "--clip", 0.01)
    ids, labels, mask = padded(run.train, [0, 1, 2])
    with torch.no_grad():
        expected = float(run.model(ids, labels, mask, 0.1)[1])
    results = []
    real = gpt2_ft.optimizer_step
    monkeypatch.setattr(gpt2_ft, "optimizer_step", lambda *a: results.append(real(*a)))
    clipped = step_gradients(run, [[0, 1], [2]])
    (result,) = results
    assert result.smoothed_loss == pytest.approx(expected, abs=1e-6)
    assert result.counted == float(mask.sum())
    assert result.norm > 0.01
    assert torch.nn.utils.get_total_norm(clipped.values()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("clip", [0, 0.01])
def test_loss_scaling_changes_neither_gradients_nor_clipping(clip: float, tiny: Tiny) -> None:
    plain, scaled = (make_run(tiny, "--clip", clip) for _ in range(2))
    scaled.scaler = GradScaler("cpu", init_scale=2.0**16)
    for run in (plain, scaled):
        randomize_adapter(run)
    expected = step_gradients(plain, [[0, 1], [2]])
    got = step_gradients(scaled, [[0, 1], [2]])
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, rtol=1e-4, atol=1e-8)
    if clip:
        assert torch.nn.utils.get_total_norm(got.values()) <= clip * 1.001


def spoil_backward(run: Run, steps: set[int]) -> None:
    """Make the loss of the given calls of the model infinite."""
    real, calls = run.model.forward, iter(range(10**6))

    def forward(*inputs: object, **settings: object) -> tuple:
        logits, loss = real(*inputs, **settings)
        return logits, loss * math.inf if next(calls) in steps else loss

    run.model.forward = forward


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_moves_nothing_but_the_data(
    scaled: bool, tiny: Tiny
) -> None:
    run = make_run(tiny, "--max_step", 4, "--eval_interval", 100)
    if scaled:
        run.scaler = GradScaler("cpu", init_scale=2.0**10)
    spoil_backward(run, {0, 1})  # both micro-batches of the first step
    before = {name: tensor.clone() for name, tensor in run.trained.items()}
    steps = run.sampler.steps(1)
    rate = run.scheduler.get_last_lr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm = gpt2_ft.optimizer_step(run, next(steps)).norm
        assert not math.isfinite(norm)
        assert all(torch.equal(tensor, before[name]) for name, tensor in run.trained.items())
        assert run.scheduler.get_last_lr() == rate
        assert all(p.grad is None for p in run.trained.values())
        norm = gpt2_ft.optimizer_step(run, next(steps)).norm
    assert math.isfinite(norm)
    assert run.scheduler.get_last_lr() != rate
    if scaled:
        assert run.scaler.get_scale() == 2.0**9


def test_skipped_steps_are_not_counted_as_steps_and_the_data_moves_on(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tiny, "--max_epoch", 1)
    spoil_backward(run, {2, 3})
    seen = []
    real = gpt2_ft.optimizer_step
    monkeypatch.setattr(
        gpt2_ft, "optimizer_step", lambda r, rows: seen.append(rows) or real(r, rows)
    )
    gpt2_ft.train_validate(run, 1)
    assert (run.step, run.batches_taken, run.bad_steps) == (5, 6, 0)
    assert seen == list(run.sampler.steps(1))
    assert sorted(i for rows in seen for micro in rows for i in micro) == list(range(21))


@pytest.mark.parametrize("good", [0, 4])
def test_too_many_bad_steps_in_a_row_end_the_run_and_name_the_last_good_file(
    good: int, tiny: Tiny
) -> None:
    run = make_run(tiny, "--max_bad_steps", 3, "--save_interval", 1)
    spoil_backward(run, set(range(2 * good, 1000)))
    named = "model.3.safetensors" if good else "Nothing was saved"
    with pytest.raises(InputError, match=f"3 steps in a row.*{named}"):
        gpt2_ft.train_validate(run, 1)
        gpt2_ft.train_validate(run, 2)


def test_tensors_that_are_not_finite_are_never_saved_and_the_last_good_file_stays(
    tiny: Tiny,
) -> None:
    """One step at a rate of 1e30 leaves finite tensors that no step can follow, and then none."""
    rates = ["--scheduler", "cycle", "--i_steps", "0,4,5", "--i_lrs", "0.01,0.01,1e30"]
    argv = tiny.argv("run", *rates, "--save_interval", 1, "--keep_last", 1, "--eval_interval", 99)
    with pytest.raises(InputError, match="not finite.*lower --lr.*The last good file is ") as end:
        gpt2_ft.main([*argv, "--max_bad_steps", "3"])
    good = Path(str(end.value).rsplit(" ", 1)[1])
    for path in (tiny.folder / "run").glob("*.safetensors"):
        tensors = load_file(path)
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values()), path
    header, _ = checkpoints.read_adapter(good)
    run = make_run(tiny)
    state = State.read(tiny.folder / "run" / "state.pt")
    assert all(torch.isfinite(tensor).all() for tensor in state.trained.values())
    assert header.step <= state.step
    checkpoints.apply_trained(run.model, load_file(good), "good")
    assert math.isfinite(gpt2_ft.optimizer_step(run, [[0, 1]]).norm)


def test_logged_losses_are_those_without_smoothing_and_the_optimised_one_has_its_own_name(
    tiny: Tiny,
) -> None:
    flags = ["--lora_dropout", 0, "--label_smooth", 0.3, "--train_batch_size", 21, "--grad_acc", 1]
    run = make_run(tiny, *flags)
    logits, labels = [], []
    for i in range(21):
        batch = run.train.batch([i])
        own, _ = run.model(batch.input_ids[None])
        logits.append(own[0, batch.counted])
        labels.append(batch.targets)
    every, right = torch.cat(logits).detach(), torch.cat(labels)
    gpt2_ft.main(tiny.argv("run", *flags, "--max_step", 3, "--warmup_step", 0))
    records = log_of(tiny.folder / "run")
    first = records[0]
    assert first["loss"] == pytest.approx(float(F.cross_entropy(every, right)), abs=1e-5)
    smoothed = F.cross_entropy(every, right, label_smoothing=0.3)
    assert first["smoothed_loss"] == pytest.approx(float(smoothed), abs=1e-5)
    assert first["ppl"] == pytest.approx(math.exp(first["loss"]))
    assert abs(first["smoothed_loss"] - first["loss"]) > 0.001


@pytest.mark.parametrize("interval, steps", [(100, [1, 6, 12]), (4, [1, 4, 6, 8, 12])])
def test_the_first_step_and_the_last_of_each_epoch_are_always_logged(
    interval: int, steps: list[int], tiny: Tiny
) -> None:
    gpt2_ft.main(tiny.argv("run", "--log_interval", interval))
    train = [record for record in log_of(tiny.folder / "run") if record["kind"] == "train"]
    assert [record["step"] for record in train] == steps


def log_of(folder: Path) -> list[dict]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_validation_is_the_unsmoothed_token_mean_for_any_batch_size_and_call(tiny: Tiny) -> None:
    write_rows(tiny.folder / "valid.jsonl", random_rows(10, seed=4))
    run = make_run(tiny, "--lora_dropout", 0.5, "--label_smooth", 0.3)
    randomize_adapter(run)
    sums = tokens = 0.0
    run.model.eval()
    with torch.no_grad():
        for i in range(10):
            ids, labels, mask = padded(run.valid, [i])
            logits, _ = run.model(ids)
            losses = F.cross_entropy(logits[mask > 0], labels[mask > 0], reduction="sum")
            sums, tokens = sums + float(losses), tokens + int(mask.sum())
    run.model.train()
    for size in (1, 1, 2, 4, 5, 10, 100):
        loss, perplexity = gpt2_ft.evaluate(run.model, run.valid, run.runtime, size)
        assert loss == pytest.approx(sums / tokens, abs=1e-6)
        assert perplexity == pytest.approx(math.exp(loss))
    assert run.model.training


def test_schedule_moves_once_per_step_whatever_the_accumulation(tiny: Tiny) -> None:
    """21 rows in micro-batches of 2, four a step: 3 steps, the first at the whole rate."""
    gpt2_ft.main(
        tiny.argv("run", "--grad_acc", 4, "--max_epoch", 1, "--warmup_step", 0, "--lr", 0.01)
    )
    log = (tiny.folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in log]
    rates = [record["lr"] for record in records if record["kind"] == "train"]
    assert rates == pytest.approx([0.01 * 2 / 3, 0.01 / 3, 0.0])
    assert all(
        {"loss", "ppl", "lr", "tokens_per_second", "peak_memory_gb"} <= set(record)
        for record in records
        if record["kind"] == "train"
    )


def test_training_data_through_a_pipe_give_the_files_adapter_to_the_byte(tiny: Tiny) -> None:
    gpt2_ft.main(tiny.argv("run", "--max_step", 3))
    pipe = through_a_pipe(tiny.folder / "train.jsonl")
    gpt2_ft.main(tiny.argv("piped", "--max_step", 3, "--train_data", pipe))
    adapters = [tiny.folder / run / "model.3.safetensors" for run in ("run", "piped")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    header, _ = checkpoints.read_adapter(adapters[1])
    data = (tiny.folder / "train.jsonl").read_bytes()
    assert header.train_data == hashlib.sha256(data).hexdigest()


def test_columns_named_by_flag_are_part_of_the_runs_settings(
    tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"a": row["context"], "b": row["completion"], "c": [1]} for row in random_rows(21)]
    path = tiny.folder / "other.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    flags = ("--train_data", path, "--valid_data", path, "--max_step", 3)
    gpt2_ft.main(tiny.argv("run", *flags, "--fields", "a:b"))
    assert f"{path}: 21 rows (JSON array, a -> b)" in capsys.readouterr().out
    err = refusal(tiny.argv("run", *flags, "--fields", "a:c", "--resume", "auto"), capsys)
    assert "fields changed since the run was started (fields was a:b, is a:c)" in err


def test_joint_loss_counts_the_context_too(tiny: Tiny) -> None:
    clm, jlm = (make_run(tiny, "--obj", objective).train for objective in ("clm", "jlm"))
    for i in range(len(clm)):
        context = len(clm.rows[i].context)
        assert jlm[i]["mask"].sum() - clm[i]["mask"].sum() == context - 1


@pytest.mark.parametrize("lora_dim", [2, 0])
def test_gradient_checkpointing_gives_the_same_adapter_from_fewer_kept_tensors(
    tiny: Tiny, lora_dim: int
) -> None:
    kept = []

    def count(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel()
        return tensor

    files = []
    for name, flags in (("plain", []), ("checkpointed", ["--gradient_checkpointing"])):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            argv = tiny.argv(name, "--max_step", 3, "--lora_dim", lora_dim, *flags)
            gpt2_ft.main(argv)
        files.append((tiny.folder / name / "model.3.safetensors").read_bytes())
    assert files[0] == files[1]
    assert kept[1] < kept[0]


def test_bf16_trains_near_fp32(tiny: Tiny) -> None:
    losses = []
    for flags in ([], ["--bf16"]):
        run = make_run(tiny, *flags)
        steps = [gpt2_ft.optimizer_step(run, rows).loss for rows in run.sampler.steps(1)]
        losses.append(torch.tensor(steps))
    assert (losses[0] - losses[1]).abs().max() < 0.05
    assert not torch.equal(*losses)


def test_every_module_imports_without_a_warning() -> None:
    assert {
        "gpt2_ft",
        "training.tensorboard",
        "loralib.layers",
        "experiments.sweep",
        "eval",
    } <= set(MODULES)
    code = "; ".join(f"import {name}" for name in MODULES)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
