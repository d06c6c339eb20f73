"""What a run says of itself: its settings and sizes at the start, its steps, and how it ended."""

import math
import shutil
from pathlib import Path
from typing import cast

from torch import nn

import checkpoints
import gpu
from eval.choice import SCORES, in_words
from gpu import Runtime
from methods import table_3_row
from model import GPT2LMModel
from training.run import Interval, Plan, Run, RunSettings, state_tensors, trained_tensors
from training.scores import ValidTexts

# Of flags that differ from the recipe's, those that say nothing of the training.
UNINTERESTING = {
    "uses_sample", "train_data", "valid_data", "work_dir", "resume", "resume_anyway", "dry_run",
    "keep_last", "log_interval", "device", "local_rank", "platform", "dist_timeout", "csv", "wandb",
}  # fmt: skip


def print_settings(flags: dict[str, object], recipe: dict[str, object], work_dir: Path) -> None:
    """Print, one a line, the settings that are not the recipe's."""
    other = {
        name: flags[name]
        for name, value in recipe.items()
        if flags[name] != value and name not in UNINTERESTING
    }
    print(f"Settings other than the E2E recipe's ({work_dir / 'run.json'} has all):")
    width = max(map(len, other), default=0)
    for name, value in sorted(other.items()):
        print(f"  {name:<{width}}  {value}")


def print_sizes(
    model: nn.Module, runtime: Runtime, plan: Plan, rows: int, work_dir: Path | None
) -> None:
    """Print what is trained and for how long."""
    model = gpu.unwrap(model)
    total = sum(p.numel() for p in model.parameters())
    card = checkpoints.card_of(model.state_dict())
    trained, saved = trained_parameters(model), saved_parameters(model)
    maker = f" (they make the {saved:,} that are saved)" if saved < trained else ""
    print(
        f"{card}: {trained:,} trainable parameters of {total:,}{maker}, "
        f"{runtime.precision} on {runtime.device}, {_count(runtime.world_size, 'process')}; "
        f"{_count(rows, 'row')} in steps of {plan.global_batch}, "
        f"{_count(plan.steps_per_epoch, 'step')} an epoch, "
        f"{plan.max_step:,} in all, {plan.warmup_step:,} of them warm-up; into "
        f"{work_dir or 'the next runs/NNN'}"
    )


def _count(number: int, noun: str) -> str:
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"


def print_published(model: GPT2LMModel, method: str) -> None:
    """Print what the LoRA paper counts for this setting, if it is a row of its table 3."""
    config, card = model.config, checkpoints.card_of(model.state_dict())
    size = config.bottleneck.dim if config.bottleneck else 0
    if config.lora and config.lora.targets == ("q", "v"):
        size = config.lora.r
    if config.prefix:
        size = config.prefix.length
    row = table_3_row(card, method, size)
    if row and row.count == saved_parameters(model):
        note = f", {row.note}" if row.note else ""
        print(f"The LoRA paper's table 3, {row.name}: {row.printed}{note}; here {row.count:,}")


def trained_parameters(model: nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(tensor.numel() for tensor in trained_tensors(model).values())


def saved_parameters(model: nn.Module) -> int:
    """Return how many numbers an adapter file holds: of a prefix fewer than make it in training,
    of a kind that keeps frozen tensors more than are trained. They need not have values."""
    prefix = cast(GPT2LMModel, model).transformer.prefix
    if prefix is not None:
        return prefix.count
    return sum(tensor.numel() for tensor in state_tensors(model).values())


def print_scoring(texts: ValidTexts, plan: Plan, settings: RunSettings) -> None:
    """Print what the scores add to the validations, and what is chosen by them."""
    scoring, count = texts.scoring, plan.occasions(settings.eval_interval)
    names = ", ".join(SCORES[name] for name in scoring.scores)
    print(
        f"Scores: {names} of {len(texts.items):,} contexts with "
        f"{sum(len(item.references) for item in texts.items):,} references, by the rules of "
        f"{scoring.task}, decoded {count:,} times with beam {scoring.search.beam} and at most "
        f"{scoring.search.eval_len} tokens; the best adapter is chosen by "
        f"{SCORES.get(scoring.decider, scoring.decider)}"
    )


def print_disk(model: nn.Module, plan: Plan, settings: RunSettings, validates: bool) -> None:
    """Print how much disk the files of a run take at most, and whether there is as much."""
    stored = sum(tensor.numel() for tensor in state_tensors(model).values())
    adapter = 4 * saved_parameters(model)
    state = 4 * (stored + 2 * trained_parameters(model))  # with two moments
    count = plan.occasions(settings.save_interval)
    if settings.keep_last:
        count = min(count, settings.keep_last + 1)
    # Two states and two best adapters at once: a file takes its name when it is complete.
    total = (count + 2 * validates) * adapter + 2 * state
    best = " and the best one" if validates else ""
    folder = settings.work_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    adapters = f"{count:,} adapters" if count > 1 else "1 adapter"
    short = "" if free > total else f"; only {size_of(free)} are free, see --keep_last"
    print(
        f"Disk: up to {size_of(total)}, {adapters} of {size_of(adapter)}{best}, and a state of "
        f"{size_of(state)}{short}"
    )


def size_of(count: float) -> str:
    """Return a number of bytes as people write it, 1.4 GB."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(int(math.log(max(count, 1), 1000) + 1e-9), len(units) - 1)
    return f"{count / 1000**power:.3g} {units[power]}"


def perplexity(loss: float) -> float:
    """Return e to the power of a loss per token, finite for any finite loss."""
    return math.exp(min(loss, 700))


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


def log_validation(
    run: Run, epoch: int, loss: float, scores: dict[str, float], is_better: bool
) -> None:
    """Log a validation: its loss, and the scores of its texts by name."""
    mark = ", the best so far" if is_better else ""
    run.log.record(
        "valid",
        run.step,
        f"step {run.step:>6}/{run.plan.max_step} | epoch {epoch} | valid loss {loss:.4f} | "
        f"valid ppl {perplexity(loss):.2f}"
        f"{''.join(f' | valid {in_words(*score)}' for score in scores.items())}{mark}",
        loss=loss,
        ppl=perplexity(loss),
        **scores,
    )


def print_end(run: Run) -> None:
    """Say why the run ended, and where its results are."""
    if run.out_of_patience:
        print(
            f"Stopped early after step {run.step}: {run.no_better} validations without a better "
            f"one than step {run.best_step} (--patience {run.settings.patience})"
        )
    best = ""
    if run.best_value is not None:
        value = in_words(run.scoring.decider, run.best_value)
        best = (
            f"; best on validation: {run.adapter_path('best')}, {value} at step {run.best_step:,}"
        )
    print(f"Done: {run.step:,} steps. Last adapter: {run.adapter_path(run.step)}{best}")
