"""Where a program runs: device, precision and process group. Launchers: none, or torchrun.

Every function works alike with one process, where the collective ones have nothing to do.
"""

import argparse
import ctypes
import os
import random
import re
import resource
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import InputError

OTHER_PLATFORMS = ("azure", "philly", "k8s")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
ANSWER_SECONDS = 2.0
_stores: list[dist.Store] = []  # the key-value store of the process group, while there is one


def add_gpu_params(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `parse_gpu` reads."""
    group = parser.add_argument_group("where it runs")
    group.add_argument("--platform", default="local", help="local, or any machine under torchrun")
    group.add_argument("--local_rank", "--local-rank", type=int, help="set by the launcher")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    group.add_argument("--fp16", action="store_true", help="float16 autocast with loss scaling")
    group.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="only algorithms that give the same bits each time, slower on a GPU",
    )
    group.add_argument("--random_seed", type=int, default=110, help="default: %(default)s")
    group.add_argument(
        "--dist_timeout",
        type=float,
        default=1800,
        help="seconds a rank waits for the others before it gives up (default: %(default)s)",
    )


def parse_gpu(args: argparse.Namespace) -> None:
    """Set `args.rank`, `local_rank`, `world_size` and `device` from the environment of torchrun, or
    for one process without it, and join the process group.

    Raises:
        InputError: the platform, device or precision asked for is not to be had here.
    """
    if args.platform in OTHER_PLATFORMS:
        raise InputError(
            f"--platform {args.platform} needs a cluster's own launcher, which is not supported; "
            "start this script by torchrun on each node instead"
        )
    if args.platform != "local":
        raise InputError(f"--platform {args.platform} is unknown; leave it out, or give local")
    if not 1 <= args.dist_timeout <= 1e7:
        raise InputError(f"--dist_timeout {args.dist_timeout} must be between 1 and 1e7 seconds")
    args.rank = int(os.environ.get("RANK", 0))
    args.world_size = int(os.environ.get("WORLD_SIZE", 1))
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank or 0))
    args.device = _choose_device(args.device, args.local_rank)
    _check_precision(args)
    if args.device.type == "cpu":
        reuse_freed_memory()
    if args.deterministic:
        _be_deterministic()
    if "WORLD_SIZE" in os.environ:
        _join_group(args)


def _join_group(args: argparse.Namespace) -> None:
    timeout = timedelta(seconds=args.dist_timeout)
    place = {"rank": args.rank, "world_size": args.world_size}
    backend = "nccl" if args.device.type == "cuda" else "gloo"
    try:
        store = _open_store(timeout)
        # torchrun keeps one store over all restarts, the addresses of dead processes in it.
        store = dist.PrefixStore(_agree_on_name(args, store), store)
        dist.init_process_group(backend, store=store, timeout=timeout, **place)
    except RuntimeError as error:
        raise SystemExit(
            f"error: rank {args.rank} could not join the {args.world_size} processes within "
            f"--dist_timeout {args.dist_timeout:g} seconds: {str(error).splitlines()[0]}"
        ) from error
    _stores[:] = [store]


def _open_store(timeout: timedelta) -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return store


def _agree_on_name(args: argparse.Namespace, store: dist.Store) -> str:
    """A name for this start of the group that all its ranks know and no earlier start had.

    Every rank leaves a word of its own; rank 0 answers each word with its own, until all ranks
    have said that they got it. What earlier starts left in the store is answered too, to no end.
    Counts of restarts would not do: they differ between the agents of several machines.
    """
    mine = uuid.uuid4().hex
    if args.rank:
        store.set(f"word {args.rank}", mine)
        name = store.get(f"answer to {mine}").decode()
        store.set(f"{name} reached {args.rank}", "")
        return name
    absent, deadline = set(range(1, args.world_size)), time.monotonic() + args.dist_timeout
    while absent:
        for rank in sorted(absent):
            if store.check([f"word {rank}"]):
                store.set(f"answer to {store.get(f'word {rank}').decode()}", mine)
            if store.check([f"{mine} reached {rank}"]):
                absent.remove(rank)
        if time.monotonic() > deadline:
            raise SystemExit(
                f"error: {_ranks(absent)} did not start within --dist_timeout "
                f"{args.dist_timeout:g} seconds"
            )
        time.sleep(0.01)
    return mine


def _ranks(ranks: set[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"


@contextmanager
def naming_lost_ranks(args: argparse.Namespace, advice: str) -> Iterator[None]:
    """Where another rank dies or hangs in the block, end with one sentence that names it and gives
    `advice`. A rank that dies is noticed at once on gloo, one that hangs after `--dist_timeout`.

    Raises:
        SystemExit: with the sentence; exit code 1.
    """
    try:
        yield
    except RuntimeError as error:
        of_group = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not (_stores and of_group):
            raise
        absent = _absent_ranks(args, _stores[0])
        who = f"{_ranks(absent)} ended or hangs" if absent else "a connection broke"
        raise SystemExit(
            f"error: rank {args.rank} cannot go on: {who} (ranks wait {args.dist_timeout:g} "
            f"seconds for each other, --dist_timeout); {advice}"
        ) from error


def _absent_ranks(args: argparse.Namespace, store: dist.Store) -> set[int]:
    """The ranks that do not say within `ANSWER_SECONDS` that they lost the others, too."""
    absent, deadline = set(range(args.world_size)), time.monotonic() + ANSWER_SECONDS
    try:
        store.set(f"{args.rank} is alone", "")
        while absent and time.monotonic() < deadline:
            absent -= {rank for rank in absent if store.check([f"{rank} is alone"])}
            time.sleep(0.02)
    except RuntimeError:  # the store went with rank 0, which held it
        return absent if 0 not in absent else {0}
    return absent


def _choose_device(wanted: str, local_rank: int) -> torch.device:
    if wanted not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {wanted} is unknown; give auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here; leave the flag out")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            "start no more processes than that (--nproc_per_node)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _be_deterministic() -> None:
    """Operations that have no deterministic form raise from now on. A CPU needs none of this."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _check_precision(args: argparse.Namespace) -> None:
    if args.fp16 and args.bf16:
        raise InputError("--fp16 and --bf16 exclude each other; give one")
    if args.fp16 and args.device.type == "cpu":
        raise InputError("--fp16 needs a CUDA device; on a CPU give --bf16 or nothing")


def reuse_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, where it would hand all large
    ones back to the system: a training step on a CPU then has no page faults, where it had 30,000
    for gpt2.sm, and is about a tenth faster. With another C library nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def autocast(args: argparse.Namespace) -> AbstractContextManager:
    """The mixed-precision context that `--fp16` or `--bf16` asks for."""
    if not (args.fp16 or args.bf16):
        return nullcontext()
    return torch.autocast(args.device.type, torch.float16 if args.fp16 else torch.bfloat16)


def distributed_opt(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """The model as it is trained: itself, or in DistributedDataParallel under torchrun."""
    if not dist.is_initialized():
        return model
    devices = [args.local_rank] if args.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def no_sync(model: nn.Module, skip: bool) -> AbstractContextManager:
    """A context in which gradients stay on their rank if `skip`; around forward and backward."""
    return model.no_sync() if skip and dist.is_initialized() else nullcontext()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def distributed_sum(args: argparse.Namespace, values: list[float]) -> list[float]:
    """Each number summed over all ranks, in float64."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=args.device)
    dist.all_reduce(total)
    return total.tolist()


def distributed_gather(args: argparse.Namespace, value: object) -> list:
    """The `value`s of all ranks in rank order, on every rank; any size, any picklable type."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * args.world_size
    dist.all_gather_object(gathered, value)
    return gathered


def distributed_sync(args: argparse.Namespace) -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def cleanup(args: argparse.Namespace) -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _stores.clear()


def to_device(args: argparse.Namespace, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch on `args.device`; to a GPU from pinned memory, so that copying does not block."""
    if args.device.type == "cpu":
        return batch
    return {key: t.pin_memory().to(args.device, non_blocking=True) for key, t in batch.items()}


def peak_memory_gb(args: argparse.Namespace) -> float:
    """Largest memory use so far in 1e9 bytes: of the GPU's allocator, or of the process."""
    if args.device.type == "cuda":
        return torch.cuda.max_memory_allocated(args.device) / 1e9
    return peak_resident_bytes() / 1e9


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far.

    getrusage is not asked on Linux: its ru_maxrss survives exec, so that a program would report
    what the one that started it had.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def generator_states() -> dict:
    """State of the random generators of Python, NumPy and PyTorch, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_generator_states(states: dict) -> None:
    """Put back what `generator_states` gave."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
