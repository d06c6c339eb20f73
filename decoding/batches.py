"""From rows to hypotheses: each distinct context once, in batches that all processes share."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from tqdm import tqdm

from data_utils import Rows
from decoding.beam_search import Hypothesis
from decoding.generate import Settings, complete
from decoding.journal import Found, Journal
from decoding.sources import Task
from gpu import Runtime
from model import GPT2LMModel

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}, {rate_noinv_fmt}, {remaining} left"

Context = tuple[int, ...]


def tasks_of_rows(rows: Rows, adapters: Mapping[Task, object]) -> list[Task]:
    """Return which adapter each row of the data asks for, which is None where there is one alone.

    Raises:
        InputError: names the first row whose task is no adapter.
    """
    if len(adapters) == 1:
        return [None] * len(rows)
    tasks = [row.get("task", "") for row in rows.also]
    for number, task in enumerate(tasks):
        if not isinstance(task, str | None) or task not in adapters:
            names = ", ".join(filter(None, adapters))
            given = "task is missing; give one" if task == "" else f"task {task!r:.40} is none"
            raise rows.error(
                number, f"{given} of the adapters ({names}), or null for the base alone"
            )
    return tasks


@dataclass(frozen=True)
class Batch:
    """Contexts of one task that are decoded together; `rows` are the first that have them."""

    number: int
    task: Task
    contexts: list[Context]
    rows: list[int]


def make_batches(
    tasks: Sequence[Task], contexts: Sequence[Context], batch_size: int
) -> list[Batch]:
    """Return the distinct contexts of each task in batches of like length. They depend on nothing
    else, so that each batch gives the same bits in whichever process it is searched."""
    batches: list[Batch] = []
    for task in dict.fromkeys(tasks):
        first: dict[Context, int] = {}
        for row, (context, own) in enumerate(zip(contexts, tasks, strict=True)):
            if own == task:
                first.setdefault(context, row)
        longest_first = sorted(first, key=len, reverse=True)
        for start in range(0, len(longest_first), batch_size):
            batch = longest_first[start : start + batch_size]
            batches.append(Batch(len(batches), task, batch, [first[context] for context in batch]))
    return batches


def search_batch(
    runtime: Runtime,
    model: GPT2LMModel,
    batch: Batch,
    settings: Settings,
    num_return_sequences: int = 1,
    on_done: Callable[[int], object] | None = None,
) -> Found:
    """Return the hypotheses of each context of a batch. A context that is sampled has the number of
    its first row.

    Raises:
        ValueError: the model's logits are NaN.
    """
    prompts = [torch.tensor(context, device=runtime.device) for context in batch.contexts]
    arguments = len(prompts), num_return_sequences, on_done, batch.rows
    with runtime.autocast():
        return complete(model, prompts, settings, *arguments)


def decode_batches(
    runtime: Runtime,
    batches: Sequence[Batch],
    load_model: Callable[[Task], GPT2LMModel],
    settings: Settings,
    num_return_sequences: int,
    journal: Journal,
) -> dict[tuple[Task, Context], list[Hypothesis]]:
    """Decode this process's share of the batches but those that the journal has, and return the
    hypotheses of every task and context, those of all processes.

    Raises:
        ValueError: the model's logits are NaN.
    """
    mine = [b for b in batches[runtime.rank :: runtime.world_size] if b.number not in journal.found]
    total = sum(len(batch.contexts) for batch in mine)
    hide = runtime.rank > 0 or sys.stderr is None or not sys.stderr.isatty()
    with tqdm(total=total, unit=" texts", bar_format=BAR, disable=hide) as bar:
        for task, own in groupby(mine, key=lambda batch: batch.task):
            model = load_model(task)
            for batch in own:
                found = search_batch(
                    runtime, model, batch, settings, num_return_sequences, bar.update
                )
                journal.keep(batch.number, found)
    return gather_batches(runtime, batches, journal.found)


def gather_batches(
    runtime: Runtime, batches: Sequence[Batch], own: Mapping[int, Found]
) -> dict[tuple[Task, Context], list[Hypothesis]]:
    """Return the hypotheses of every task and context on every process, each of which gives what it
    has found, by the numbers of the batches."""
    found_by_number: dict[int, Found] = {}
    for part in runtime.gather(own):
        found_by_number |= part
    return {
        (batch.task, context): hypotheses
        for batch in batches
        for context, hypotheses in zip(batch.contexts, found_by_number[batch.number], strict=True)
    }
