"""Carry out the runs of a comparison, some at a time; one that fails does not stop the others."""

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from common.errors import InputError
from experiments.runs import Run, is_done, perform, processes


def missing(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that have no result yet, each once.

    Raises:
        InputError: something of other settings has a run's name.
    """
    return [run for run in dict.fromkeys(runs) if not is_done(run)]


def carry_out(runs: Sequence[Run], workers: int, threads: int) -> bool:
    """Do what is missing of the runs on this machine; return whether all have their results."""

    def attempt(run: Run) -> bool:
        try:
            result = perform(run, threads)
        except InputError as error:
            print(error, flush=True)
            return False
        print(f"{run.name}: {summary(result)}", flush=True)
        return True

    with ThreadPoolExecutor(workers) as pool, terminating():
        try:
            return all(list(pool.map(attempt, missing(runs))))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*processes]:
                process.terminate()  # a training that is told so saves first, and resumes there
            raise


def summary(result: dict) -> str:
    """Return what a run came to, in a line."""
    if "failed" in result:
        return f"diverged: {result['failed']}"
    scores = {"valid loss": result["valid_loss"]["last"], **result.get("scores", {})}
    said = [f"{name} {value}" for name, value in scores.items() if value is not None]
    parts = {part: seconds for part, seconds in result["seconds"].items() if seconds is not None}
    return f"{', '.join(said)}; {', '.join(f'{part} {s:.0f} s' for part, s in parts.items())}"


@contextmanager
def terminating() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt("stopped; the same command resumes")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
