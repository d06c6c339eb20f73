"""Fine-tune GPT-2 with LoRA: flags, training, validation.

    torchrun gpt2_ft.py --lora_dim 4 --lora_alpha 32          the shipped sample and nano base
    python gpt2_ft.py --train_data train.jsonl --valid_data valid.jsonl --vocab vocab \\
        --init_checkpoint gpt2-medium --work_dir runs/e2e

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
from typing import cast

import torch
from torch import Tensor, nn

import gpu
from common.batch import Batch
from common.errors import InputError, Parser
from common.errors import run as run_program
from common.process_group import leave, naming_lost_ranks, speaking_once
from common.sample import sample_settings
from data_utils import FT_Dataset
from gpu import Runtime
from model import GPT2LMModel
from optimizer import add_optimizer_params
from training.flags import (
    add_data_flags,
    add_dropped_flags,
    add_model_flags,
    add_output_flags,
    add_training_flags,
    add_validation_flags,
    check_points_of_cycle,
    check_ranges,
    settle_method,
)
from training.report import (
    log_training,
    log_validation,
    perplexity,
    print_end,
    print_settings,
    print_sizes,
)
from training.resume import check_equal_states, confirm_save, find_state, last_good, save
from training.run import Interrupted, Run, write_best
from training.setup import prepare, show_plan
from training.tensorboard import show_settings, show_validation
from training.trackers import import_wandb
from training.updates import Arriving, StepResult
from training.work_dir import claimed

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_SIGNAL_SECONDS = 1.0


def build_parser() -> argparse.ArgumentParser:
    """Return a parser of every flag, with the E2E recipe as defaults."""
    parser = Parser(
        usage="%(prog)s [flags]; --help lists them",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_data_flags(parser)
    add_model_flags(parser)
    add_training_flags(parser)
    add_optimizer_params(parser)
    add_validation_flags(parser)
    add_output_flags(parser)
    gpu.add_gpu_params(parser)
    add_dropped_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the flags, with the sample's own settings where neither data nor base is given."""
    parser = build_parser()
    parser.set_defaults(uses_sample=False)
    given = given_flags(parser, argv)
    check_points_of_cycle(given)
    parser.set_defaults(**settle_method(given))
    args = parser.parse_args(argv)
    if not (args.train_data or args.init_checkpoint):
        sample = sample_settings()
        del sample["test_data"]
        if args.max_step is not None:
            del sample["warmup_step"]  # which fits its own number of steps
        parser.set_defaults(**sample, uses_sample=True)
        args = parser.parse_args(argv)
    check_ranges(args)
    if args.wandb:
        import_wandb()
    return args


def given_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict[str, object]:
    """Return the flags on the command line alone, by name."""
    absent = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), None))
    flags = vars(parser.parse_args(argv, absent))
    return {name: value for name, value in flags.items() if value is not None}


def train_validate(run: Run, epoch: int) -> None:
    """Train what is left of one epoch, logging, validating and saving on the way."""
    settings, steps = run.settings, run.plan.steps_per_epoch
    done = run.batches_taken - (epoch - 1) * steps
    for rows in run.sampler.steps(epoch, start=done):
        if run.stopping or run.finished:
            break
        started = time.perf_counter()
        run.outstanding.append(optimizer_step(run, rows))
        run.batches_taken += 1
        settle_steps(run)
        run.interval.seconds += time.perf_counter() - started
        if run.outstanding or run.bad_steps:
            continue

        # What follows only logs, validates and saves; it changes nothing in the training.
        if run.step == 1 or run.step % settings.log_interval == 0:
            log_training(run, epoch)
        if run.finished or run.batches_taken % steps == 0:
            break
        if run.validation_due:
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
    sums = runtime.sum_on_device(sum(counts), run.signal, bool(late))
    plain_sum = smoothed_sum = torch.zeros((), device=runtime.device)
    for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
        # DistributedDataParallel averages over ranks, so each one's share is scaled back up.
        share = count * runtime.world_size / sums[0]
        with gpu.no_sync(run.model, skip=i < len(batches) - 1):
            plain, smoothed = forward_backward(run, batch, run.scaler.scale(share))
        plain_sum = plain_sum + plain * count
        smoothed_sum = smoothed_sum + smoothed * count

    run.scaler.unscale_(run.optimizer)
    parameters = list(run.trained.values())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if settings.clip:
        nn.utils.clip_grads_with_norm_(parameters, settings.clip, norm)
    run.updates.take(norm)
    run.scaler.update()
    if run.graphs is None:
        run.optimizer.zero_grad()  # apex's takes no argument
    else:
        run.graphs.zero_gradients()
    own = torch.stack((norm, plain_sum, smoothed_sum)).to(sums.dtype)
    tokens = int(sum(run.train.lengths[micro].sum() for micro in rows))
    return StepResult(sum(counts), tokens, Arriving(torch.cat((own, sums[1:]))))


def forward_backward(run: Run, batch: Batch, share: Tensor) -> tuple[Tensor, Tensor]:
    """Add the gradients of `share` times the loss of a micro-batch to the parameters'; return its
    loss without and with smoothing."""

    def passes(batch: Batch, share: Tensor) -> tuple[Tensor, Tensor]:
        with run.runtime.autocast():
            plain, smoothed = run.model(batch, label_smooth=run.settings.label_smooth)
        (smoothed * share).backward()
        return plain, smoothed.detach()

    if run.graphs is not None:
        return run.graphs.run(passes, batch, share)
    return passes(run.runtime.to_device(batch), share)


def settle_steps(run: Run) -> None:
    """Count the steps whose results are known by now, and wait for all where one is needed."""
    while len(run.outstanding) > run.updates.lag or (run.outstanding and is_due(run)):
        settle_step(run, run.outstanding.popleft())


def is_due(run: Run) -> bool:
    """Whether something follows the last step taken, provided that it and those before are finite;
    what follows must wait for their results."""
    settings, step = run.settings, run.step + len(run.outstanding)
    intervals = settings.log_interval, settings.eval_interval, settings.save_interval
    return (
        step == 1
        or step >= run.plan.max_step
        or any(step % interval == 0 for interval in intervals)
        or run.batches_taken % run.plan.steps_per_epoch == 0
        or run.stopping
        or run.save_due
    )


def settle_step(run: Run, result: StepResult) -> None:
    """Count a step, once it is known whether it was finite."""
    finite = math.isfinite(result.norm)
    run.stopping, run.save_due = result.stopping, result.save_due
    run.updates.confirm(finite)
    if not finite:
        return count_bad_step(run)
    run.step += 1
    run.bad_steps = 0
    confirm_save(run)
    interval = run.interval
    interval.loss += result.loss * result.counted
    interval.smoothed_loss += result.smoothed_loss * result.counted
    interval.count += result.counted
    interval.norm = result.norm
    interval.tokens += result.tokens
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
    model: nn.Module,
    data: FT_Dataset,
    runtime: Runtime,
    batch_size: int,
    between: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Return the loss per counted token, without smoothing, and its perplexity.

    Every row counts once, by its tokens: the result does not depend on batch size or processes.
    All ranks call `between` together before each of their batches.
    """
    model = gpu.unwrap(model)
    mine = range(runtime.rank, len(data), runtime.world_size)
    most = math.ceil(len(data) / runtime.world_size)
    parts: list[tuple[Tensor, float]] = []  # read at the end, so that no batch waits for another
    model.eval()
    try:
        for start in range(0, most, batch_size):
            between()
            if rows := mine[start : start + batch_size]:
                batch = runtime.to_device(data.batch(rows))
                with runtime.autocast():
                    _, loss = model(batch)
                parts.append((loss, batch.count))
    finally:
        model.train()
    own = sum(float(loss) * count for loss, count in parts), sum(count for _, count in parts)
    loss_sum, count = runtime.sum(*own)
    return loss_sum / count, perplexity(loss_sum / count)


def validate(run: Run, epoch: int) -> None:
    """Evaluate, log, and write the adapter if it is the best so far; once per step at most. What a
    signal interrupts counts as not begun."""
    if run.valid is None or run.validated_step == run.step:
        return
    size, scores = run.settings.valid_batch_size, {}
    try:
        loss, _ = evaluate(run.model, run.valid, run.runtime, size, run.obey_signals)
        if run.valid_texts:
            model = cast(GPT2LMModel, gpu.unwrap(run.model))
            scores = run.valid_texts.score(model, run.runtime, run.obey_signals)
    except Interrupted:
        return
    better = run.count_validation(loss, scores)
    if better:
        write_best(run)
    log_validation(run, epoch, loss, scores, better)
    show_validation(run)


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
            "--vocab FOLDER --init_checkpoint FILE"
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
            print_settings(run.flags, vars(build_parser().parse_args([])), work_dir)
            print_sizes(run.model, runtime, run.plan, len(run.train), work_dir)
            if run.step:
                print(f"Resuming after step {run.step}")
        stop_on_signals(run)
        if is_first:
            stack.enter_context(run.log.opened(run.flags, run.step, run.validated_step))
            show_settings(run)
        if run.validation_due:
            validate(run, run.epoch)  # which a signal may have interrupted
        for epoch in itertools.count(run.epoch):
            train_validate(run, epoch)
            if run.finished or epoch == run.plan.max_epoch:
                break
        confirm_save(run)
    if is_first:
        print_end(run)


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
