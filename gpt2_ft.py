"""Fine-tune GPT-2 with LoRA: arguments, data, model, training, adapter checkpoints.

    torchrun gpt2_ft.py --lora_dim 4 --lora_alpha 32          the shipped sample and nano base
    python gpt2_ft.py --train_data train.jsonl --valid_data valid.jsonl --vocab vocab \\
        --model_card gpt2.md --init_checkpoint gpt2-medium/model.safetensors --work_dir runs/e2e

Defaults are the E2E recipe of the LoRA paper (arXiv 2106.09685, table 11). A step is an optimizer
step everywhere; the global batch is train_batch_size x grad_acc x number of processes.
"""

import argparse
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn

import gpu
import loralib as lora
from common.errors import InputError, Parser
from common.errors import run as run_program
from common.process_group import leave, naming_lost_ranks, speaking_once
from common.sample import sample_settings
from data.fields import add_fields_flag
from data_utils import FT_Dataset
from gpu import Runtime
from model import ALL_TARGETS, LORA_TARGETS, MODEL_CARDS
from optimizer import add_optimizer_params
from training.resume import check_equal_states, confirm_save, find_state, last_good, save
from training.run import Interval, Run, write_best
from training.setup import DEFAULT_EPOCHS, prepare, print_flags, print_sizes, show_plan
from training.tensorboard import show_settings, show_validation
from training.trackers import import_wandb
from training.work_dir import claimed

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_SIGNAL_SECONDS = 1.0
DROPPED_FLAGS = [
    "--roll_interval",
    "--roll_lr",
    "--roll_step",
    "--eval_epoch",
    "--rank",
    "--world_size",
]


class DroppedFlag(argparse.Action):
    """Refuses a flag that the original scripts parsed and never read."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        raise InputError(f"{option_string} never had an effect and was dropped; leave it out")


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with the E2E recipe as defaults."""
    parser = Parser(
        usage="%(prog)s [flags]; --help lists them",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu.add_gpu_params(parser)
    add_optimizer_params(parser)
    add = parser.add_argument_group("data").add_argument
    add("--train_data", help="JSONL, JSON, CSV or TSV of contexts and completions (docs/data.md)")
    add("--valid_data", help="the same; without it nothing is validated")
    add_fields_flag(add)
    add("--vocab", help="folder of the vocabulary; needed for text rows")
    add("--seq_len", type=int, default=512, help="longest sequence (default: %(default)s)")
    add("--obj", choices=("clm", "jlm"), default="clm", help="loss on completions, or on all")
    add = parser.add_argument_group("model").add_argument
    add("--model_card", help=f"{', '.join(MODEL_CARDS)} (default: the base's)")
    add(
        "--init_checkpoint",
        help="base weights: file, folder or gpt2[-medium, -large, -xl]; none for random ones",
    )
    add("--lora_dim", type=int, default=4, help="rank r; 0 trains all weights (default: 4)")
    add("--lora_alpha", type=float, default=32.0, help="scaling is alpha / r (default: 32)")
    add("--lora_dropout", type=float, default=0.1, help="on the adapter's input (default: 0.1)")
    add(
        "--lora_targets",
        default="q,v",
        help=f"comma-separated: {', '.join(LORA_TARGETS)}; all is {','.join(ALL_TARGETS)}; c_attn "
        "is q, k and v by one adapter (default: %(default)s)",
    )
    add("--lora_kind", choices=lora.KINDS, default="lora", help="default: %(default)s")
    add("--use_rslora", action="store_true", help="scaling is alpha / sqrt(r)")
    add(
        "--train_bias",
        choices=("none", "lora_only", "all"),
        default="none",
        help="biases to train too; all with --lora_dim 0 trains nothing else (default: none)",
    )
    add("--train_top", type=int, default=0, help="with --lora_dim 0: the last blocks alone")
    add = parser.add_argument_group("training").add_argument
    add("--train_batch_size", type=int, default=8, help="rows per process and micro-batch")
    add("--valid_batch_size", type=int, default=4, help="no effect on the result")
    add("--grad_acc", type=int, default=1, help="micro-batches per step (default: 1)")
    add("--clip", type=float, default=0.0, help="largest gradient norm; 0 for no limit")
    add("--label_smooth", type=float, default=0.1, help="in training only (default: 0.1)")
    add("--max_step", type=int, help="stop after this many steps")
    add("--max_epoch", type=int, help=f"default: {DEFAULT_EPOCHS}, or --max_step if given")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--max_bad_steps", type=int, default=25, help="give up after that many non-finite steps")
    add = parser.add_argument_group("output").add_argument
    add("--work_dir", help="default: the first free runs/NNN")
    add("--log_interval", type=int, default=100, help="in steps (default: %(default)s)")
    add("--eval_interval", type=int, default=2000, help="in steps, and after each epoch")
    add("--csv", action="store_true", help="write the log as log.csv, too")
    add("--wandb", metavar="PROJECT", help="send the log to Weights & Biases, if it is installed")
    add("--valid_samples", type=int, default=3, help="to decode each time, for TensorBoard")
    add("--save_interval", type=int, default=500, help="in steps, and after each epoch")
    add(
        "--save_minutes", type=float, default=0, help="save after that many minutes, too; 0 for not"
    )
    add("--keep_last", type=int, default=0, help="numbered adapters to keep; 0 for all (default)")
    add("--patience", type=int, default=0, help="stop after that many validations without a better")
    add("--dry_run", action="store_true", help="print sizes and steps and end; needs no weights")
    add("--resume", help="auto, or a work_dir: continue from its last save")
    add("--resume_anyway", action="store_true", help="though settings that matter have changed")
    for flag in DROPPED_FLAGS:
        parser.add_argument(
            flag, action=DroppedFlag, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the flags, with the sample's own settings where neither data nor base is given."""
    parser = build_parser()
    parser.set_defaults(uses_sample=False)
    args = parser.parse_args(argv)
    if not (args.train_data or args.init_checkpoint):
        sample = sample_settings()
        del sample["test_data"]
        parser.set_defaults(**sample, uses_sample=True)
        args = parser.parse_args(argv)
    _check_args(args)
    if args.wandb:
        import_wandb()
    return args


def _check_args(args: argparse.Namespace) -> None:
    if not args.train_data:
        raise InputError("--train_data is missing; give a file of contexts and completions")
    if not args.init_checkpoint:
        raise InputError(
            "--init_checkpoint is missing; give the base weights, or none for random ones"
        )
    least = {
        "train_batch_size": 1, "valid_batch_size": 1, "grad_acc": 1, "seq_len": 2, "lora_dim": 0,
        "log_interval": 1, "eval_interval": 1, "save_interval": 1, "save_minutes": 0,
        "keep_last": 0, "patience": 0, "max_bad_steps": 1, "max_step": 1, "max_epoch": 1,
        "valid_samples": 0, "clip": 0, "weight_decay": 0, "adam_epsilon": 0, "random_seed": 0,
        "train_top": 0,
    }  # fmt: skip
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < 2**63:
            raise InputError(f"--{name} {value} must be at least {bound} and below 2**63")
    if args.patience and not args.valid_data:
        raise InputError("--patience counts validations; give --valid_data, or leave it out")
    for name in ("lora_dropout", "label_smooth", "adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} must be in [0, 1)")
    for name in ("lora_alpha", "lr", "lora_plus_ratio"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)} must be above 0 and finite")


def train_validate(run: Run, epoch: int) -> None:
    """Train what is left of one epoch, logging, validating and saving on the way."""
    settings, steps = run.settings, run.plan.steps_per_epoch
    done = run.batches_taken - (epoch - 1) * steps
    for rows in run.sampler.steps(epoch, start=done):
        if run.stopping or run.finished:
            break
        started = time.perf_counter()
        result = optimizer_step(run, rows)
        run.batches_taken += 1
        if not math.isfinite(result.norm):
            count_bad_step(run)
            continue
        run.step += 1
        run.bad_steps = 0
        confirm_save(run)
        count_step(run, rows, result, time.perf_counter() - started)

        # What follows only logs, validates and saves; it changes nothing in the training.
        if run.step == 1 or run.step % settings.log_interval == 0:
            log_training(run, epoch)
        if run.finished or run.batches_taken % steps == 0:
            break
        if run.step % settings.eval_interval == 0:
            validate(run, epoch)
        if run.step % settings.save_interval == 0 or run.save_due:
            save(run)
    # A step is always saved after its validation, so that no resumed run repeats one.
    if not run.stopping:
        log_training(run, epoch)
        validate(run, epoch)
    save(run)
    if run.stopping:
        raise SystemExit(128 + (run.signal or signal.SIGTERM))


class StepResult(NamedTuple):
    """What one step came to: this rank's losses per counted token, without smoothing and as they
    are optimised, the number of its counted tokens, and the gradient's norm before clipping."""

    loss: float
    smoothed_loss: float
    tokens: float
    norm: float


def optimizer_step(run: Run, rows: list[list[int]]) -> StepResult:
    """Take one step on this rank's micro-batches `rows`, lists of row numbers.

    The loss is Σ loss / Σ mask over all micro-batches of all ranks, whatever their sizes; gradients
    are reduced in the last micro-batch only. Where the norm is not finite nothing is updated.
    """
    runtime, settings = run.runtime, run.settings
    # The last batch of an epoch may have no row for a rank, which then goes through the motions.
    batches = [run.train.batch(micro) for micro in rows or [[0]]]
    counts = [batch.count if rows else 0.0 for batch in batches]
    # What ranks must agree on travels with the count: a signal to any, the clock of the first.
    seconds = time.monotonic() - run.saved_at
    late = runtime.rank == 0 and settings.save_minutes and seconds > 60 * settings.save_minutes
    total, signals, due = runtime.sum(sum(counts), run.signal, bool(late))
    run.stopping, run.save_due = signals > 0, due > 0
    plain_sum = smoothed_sum = torch.zeros((), device=runtime.device)
    for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
        batch = runtime.to_device(batch)
        with gpu.no_sync(run.model, skip=i < len(batches) - 1):
            with runtime.autocast():
                plain, smoothed = run.model(batch, label_smooth=settings.label_smooth)
            # DistributedDataParallel averages over ranks, so each one's share is scaled back up.
            run.scaler.scale(smoothed * (count * runtime.world_size / total)).backward()
        plain_sum = plain_sum + plain * count
        smoothed_sum = smoothed_sum + smoothed.detach() * count

    run.scaler.unscale_(run.optimizer)
    parameters = list(run.trained.values())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if torch.isfinite(norm):
        if settings.clip:
            nn.utils.clip_grads_with_norm_(parameters, settings.clip, norm)
        run.scaler.step(run.optimizer)
        run.scheduler.step()
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    count = sum(counts)
    per_token = max(count, 1)
    return StepResult(
        float(plain_sum) / per_token, float(smoothed_sum) / per_token, count, float(norm)
    )


def count_step(run: Run, rows: list[list[int]], result: StepResult, seconds: float) -> None:
    """Add a step to what is logged next."""
    interval = run.interval
    interval.loss += result.loss * result.tokens
    interval.smoothed_loss += result.smoothed_loss * result.tokens
    interval.count += result.tokens
    interval.norm = result.norm
    interval.tokens += int(sum(run.train.lengths[micro].sum() for micro in rows))
    interval.seconds += seconds
    run.log.advance(result.loss)


def count_bad_step(run: Run) -> None:
    """Count a step whose loss or gradient was not finite; too many in a row end the run."""
    run.bad_steps += 1
    if run.bad_steps >= run.settings.max_bad_steps:
        raise InputError(
            f"{run.bad_steps} steps in a row had a loss or gradient that is not finite; lower --lr "
            f"or leave --fp16 out. {last_good(run)}"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module, data: FT_Dataset, runtime: Runtime, batch_size: int
) -> tuple[float, float]:
    """Return the loss per counted token, without smoothing, and its perplexity.

    Every row counts once, by its tokens: the result does not depend on batch size or processes.
    """
    model = gpu.unwrap(model)
    model.eval()
    mine = range(runtime.rank, len(data), runtime.world_size)
    loss_sum = count = 0.0
    for start in range(0, len(mine), batch_size):
        batch = runtime.to_device(data.batch(mine[start : start + batch_size]))
        with runtime.autocast():
            _, loss = model(batch)
        loss_sum += float(loss) * batch.count
        count += batch.count
    model.train()
    loss_sum, count = runtime.sum(loss_sum, count)
    return loss_sum / count, perplexity(loss_sum / count)


def perplexity(loss: float) -> float:
    """Return e to the power of a loss per token, finite for any finite loss."""
    return math.exp(min(loss, 700))


def validate(run: Run, epoch: int) -> None:
    """Evaluate, log, and write the adapter if it is the best so far; once per step at most."""
    if run.valid is None or run.validated_step == run.step:
        return
    run.validated_step = run.step
    loss, ppl = evaluate(run.model, run.valid, run.runtime, run.settings.valid_batch_size)
    better = loss < run.best_loss
    run.no_better = 0 if better else run.no_better + 1
    if better:
        run.best_loss, run.best_step = loss, run.step
        write_best(run)
    mark = ", the best so far" if better else ""
    run.log.record(
        "valid",
        run.step,
        f"step {run.step:>6}/{run.plan.max_step} | epoch {epoch} | valid loss {loss:.4f} | "
        f"valid ppl {ppl:.2f}{mark}",
        loss=loss,
        ppl=ppl,
    )
    show_validation(run)


def log_training(run: Run, epoch: int) -> None:
    """Log what was trained since the last time, over all ranks; nothing if there is nothing."""
    own, run.interval = run.interval, Interval()
    loss, smoothed, count, tokens = run.runtime.sum(
        own.loss, own.smoothed_loss, own.count, own.tokens
    )
    if not count:
        return
    loss, rate, ppl = loss / count, float(run.scheduler.get_last_lr()[0]), perplexity(loss / count)
    speed, memory = tokens / max(own.seconds, 1e-9), run.runtime.peak_memory_gb()
    run.log.record(
        "train",
        run.step,
        f"step {run.step:>6}/{run.plan.max_step} | epoch {epoch} | loss {loss:.4f} | "
        f"ppl {ppl:.2f} | lr {rate:.2e} | {speed:.0f} tokens/s | {memory:.2f} GB",
        loss=loss,
        ppl=ppl,
        smoothed_loss=smoothed / count,
        lr=rate,
        grad_norm=own.norm,
        tokens_per_second=speed,
        peak_memory_gb=memory,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the program with the given or the command line's arguments."""
    try:
        with speaking_once():
            args = parse_args(argv)
            runtime = gpu.parse_gpu(args)
            # A rank that lost others is sent SIGTERM while it still asks who they are.
            advice = "--resume auto resumes from the last save"
            with restoring_signal_handlers(), naming_lost_ranks(advice):
                fine_tune(args, runtime)
    finally:
        leave()


def fine_tune(args: argparse.Namespace, runtime: Runtime) -> None:
    """Set a run up, go through its epochs, and say where the results are."""
    is_first = runtime.rank == 0
    if args.uses_sample and is_first:
        print(
            "Neither --train_data nor --init_checkpoint given: fine-tuning the shipped nano base "
            "on the shipped sample. For your own: --train_data FILE --valid_data FILE "
            "--vocab FOLDER --model_card gpt2.md --init_checkpoint FILE"
        )
    if args.dry_run:
        return show_plan(args, runtime)
    with ExitStack() as stack:
        # Before the lock is ours, a run that is ending may still write its state.
        claim = claimed(args.work_dir, args.resume)
        work_dir = runtime.from_first(lambda: stack.enter_context(claim))
        state = find_state(work_dir, args.resume)
        check_equal_states(runtime, work_dir, state)
        run = prepare(args, runtime, work_dir, state)
        if is_first:
            print_flags(run.flags)
            print_sizes(args, runtime, run.plan, run.model, len(run.train), work_dir)
            if run.step:
                print(f"Resuming after step {run.step}")
        stop_on_signals(run)
        if is_first:
            stack.enter_context(run.log.opened(run.flags, run.step, run.validated_step))
            show_settings(run)
        for epoch in itertools.count(run.epoch):
            train_validate(run, epoch)
            if run.finished or epoch == run.plan.max_epoch:
                break
        confirm_save(run)
    if is_first:
        print_end(run)


def print_end(run: Run) -> None:
    """Say why the run ended, and where its results are."""
    if run.out_of_patience:
        print(
            f"Stopped early after step {run.step}: {run.no_better} validations without a better "
            f"one than step {run.best_step} (--patience {run.settings.patience})"
        )
    best = ""
    if run.best_step:
        best = (
            f"; best on validation: {run.adapter_path('best')}, loss {run.best_loss:.4f} at step "
            f"{run.best_step:,}"
        )
    print(f"Done: {run.step:,} steps. Last adapter: {run.adapter_path(run.step)}{best}")


@contextmanager
def restoring_signal_handlers() -> Iterator[None]:
    """Put the handlers of SIGTERM and SIGINT back at the end of the block."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            _handle(number, handler)


def stop_on_signals(run: Run) -> None:
    """From now on let the step end on SIGTERM or SIGINT, to save and exit with 143 or 130; on a
    second signal exit at once.

    A shell, a scheduler and torchrun may each pass the same signal on: those that come within
    `ONE_SIGNAL_SECONDS` count as one.
    """
    first = 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal first
        if not run.signal:
            run.signal, first = number, time.monotonic()
        elif time.monotonic() - first > ONE_SIGNAL_SECONDS:
            os._exit(128 + number)

    for number in SIGNALS:
        _handle(number, handle)


def _handle(number: int, handler: Callable | int | None) -> None:
    """Set a handler in the main thread, which alone may do so and is told of signals."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


if __name__ == "__main__":
    run_program(main)
