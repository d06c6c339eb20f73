"""The processes of one run: what their launcher says, how they meet, and who is missing when one
of them is lost.

Launchers are torchrun, or whatever sets the same variables. One process needs no group.
"""

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from common.errors import InputError

ANSWER_SECONDS = 2.0


@dataclass(frozen=True)
class Place:
    """Which process of how many this one is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


@dataclass(frozen=True)
class Group:
    """What lets a rank ask after the others: the store they all know, and how long they wait."""

    place: Place
    store: dist.Store
    timeout: float


_group: Group | None = None  # of this process, while it is in one


def read_place(local_rank: int | None = None, environment: Mapping[str, str] = os.environ) -> Place:
    """Which process this is by the variables of its launcher; the only one where there are none.

    Args:
        local_rank: what the launcher gave as a flag; the variable LOCAL_RANK rules.

    Raises:
        InputError: the variables are incomplete, no numbers, or contradict each other.
    """
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    size, rank, local = (_whole_number(name, environment.get(name)) for name in names)
    local = local_rank if local is None else local
    if size is None and rank is not None:
        raise _incomplete("WORLD_SIZE", f"RANK is {rank}")
    if size in (None, 1) and not rank and not local:
        return Place()
    if size is None:
        raise _incomplete("WORLD_SIZE", f"LOCAL_RANK is {local}")
    if rank is None or local is None:
        raise _incomplete("RANK" if rank is None else "LOCAL_RANK", f"WORLD_SIZE is {size}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise _incomplete(name, f"WORLD_SIZE is {size}")
    if not rank < size or not local < size:
        raise InputError(
            f"the launcher's variables contradict each other: RANK {rank} and LOCAL_RANK {local} "
            f"must be below WORLD_SIZE {size}"
        )
    _whole_number("MASTER_PORT", environment["MASTER_PORT"])
    return Place(rank, size, local)


def _whole_number(name: str, text: str | None) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise InputError(
            f"the variable {name} is {text!r:.40}, not a number from 0 up; start by torchrun, or "
            "unset it for one process"
        )
    return int(text)


def _incomplete(name: str, because: str) -> InputError:
    return InputError(
        f"the variable {name} is missing though {because}; start by torchrun, which sets RANK, "
        "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or unset them all for one process"
    )


def join(place: Place, backend: str, timeout: float) -> None:
    """Meet the other processes; each waits `timeout` seconds for them, now and ever after.

    Raises:
        SystemExit: the others did not come; with one sentence, exit code 1.
    """
    global _group
    patience = timedelta(seconds=timeout)
    try:
        store = _open_store(patience)
        # torchrun keeps one store over all restarts, the addresses of dead processes in it.
        store = dist.PrefixStore(_agree_on_name(Group(place, store, timeout)), store)
        dist.init_process_group(
            backend, store=store, timeout=patience, rank=place.rank, world_size=place.world_size
        )
    except RuntimeError as error:
        raise SystemExit(
            f"error: rank {place.rank} could not join the {place.world_size} processes within "
            f"--dist_timeout {timeout:g} seconds: {str(error).splitlines()[0]}"
        ) from error
    _group = Group(place, store, timeout)


def leave() -> None:
    """Leave the process group, if this process is in one."""
    global _group
    if dist.is_initialized():
        dist.destroy_process_group()
    _group = None


@contextmanager
def speaking_once() -> Iterator[None]:
    """Let rank 0 alone say an InputError of the block that all ranks meet; one that differs is said
    by its rank as well.

    Raises:
        SystemExit: with exit code 2 and no sentence, where rank 0 says it.
    """
    try:
        yield
    except InputError as error:
        if _is_said_by_first(str(error)):
            raise SystemExit(2) from error
        raise


def _is_said_by_first(sentence: str) -> bool:
    """Return whether rank 0 says the same; on rank 0, let the others know. False if in doubt."""
    try:
        place = read_place()
        if place.world_size == 1:
            return False
        store = _group.store if _group else _open_store(timedelta(seconds=ANSWER_SECONDS))
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives a start
        store = dist.PrefixStore(f"said at start {start}", store)
        if place.rank == 0:
            store.set("sentence", sentence)
            return False
        store.wait(["sentence"], timedelta(seconds=ANSWER_SECONDS))
        return store.get("sentence").decode() == sentence
    except (InputError, RuntimeError, ValueError):
        return False


def _open_store(timeout: timedelta) -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return store


def _agree_on_name(group: Group) -> str:
    """Return a name for this start of the group that all its ranks know and no earlier start had.

    Every rank leaves a word of its own; rank 0 answers each word with its own, until all ranks
    have said that they got it. What earlier starts left in the store is answered too, to no end.
    Counts of restarts would not do: they differ between the agents of several machines.
    """
    mine, store, rank = uuid.uuid4().hex, group.store, group.place.rank
    if rank:
        store.set(f"word {rank}", mine)
        name = store.get(f"answer to {mine}").decode()
        store.set(f"{name} reached {rank}", "")
        return name
    absent, deadline = set(range(1, group.place.world_size)), time.monotonic() + group.timeout
    while absent:
        for rank in sorted(absent):
            if store.check([f"word {rank}"]):
                store.set(f"answer to {store.get(f'word {rank}').decode()}", mine)
            if store.check([f"{mine} reached {rank}"]):
                absent.remove(rank)
        if time.monotonic() > deadline:
            raise SystemExit(
                f"error: {_ranks(absent)} did not start within --dist_timeout "
                f"{group.timeout:g} seconds"
            )
        time.sleep(0.01)
    return mine


def _ranks(ranks: set[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"


@contextmanager
def naming_lost_ranks(advice: str) -> Iterator[None]:
    """Where another rank dies or hangs in the block, end with one sentence that names it and gives
    `advice`. A rank that dies is noticed at once on gloo, one that hangs after `--dist_timeout`.

    Raises:
        SystemExit: with the sentence; exit code 1.
    """
    try:
        yield
    except RuntimeError as error:
        of_group = isinstance(error, dist.DistError) or "gloo" in str(error)
        if _group is None or not of_group:
            raise
        absent = _absent_ranks(_group)
        who = f"{_ranks(absent)} ended or hangs" if absent else "a connection broke"
        raise SystemExit(
            f"error: rank {_group.place.rank} cannot continue: {who} (ranks wait "
            f"{_group.timeout:g} seconds for each other, --dist_timeout); {advice}"
        ) from error


def _absent_ranks(group: Group) -> set[int]:
    """Return the ranks that do not say within `ANSWER_SECONDS` that they lost the others, too."""
    absent, deadline = set(range(group.place.world_size)), time.monotonic() + ANSWER_SECONDS
    try:
        group.store.set(f"{group.place.rank} is alone", "")
        while absent and time.monotonic() < deadline:
            absent -= {rank for rank in absent if group.store.check([f"{rank} is alone"])}
            time.sleep(0.02)
    except RuntimeError:  # the store went with rank 0, which held it
        return absent if 0 not in absent else {0}
    return absent
