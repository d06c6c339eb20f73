"""Where a program runs: device, precision and process group. Launchers: none, or torchrun.

Every function works alike with one process, where the collective ones have nothing to do.
"""

import argparse
import ctypes
import os
import random
import resource
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import InputError

OTHER_PLATFORMS = ("azure", "philly", "k8s")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def add_gpu_params(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `parse_gpu` reads."""
    group = parser.add_argument_group("where it runs")
    group.add_argument("--platform", default="local", help="local, or any machine under torchrun")
    group.add_argument("--local_rank", "--local-rank", type=int, help="set by the launcher")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    group.add_argument("--fp16", action="store_true", help="float16 autocast with loss scaling")
    group.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
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
    if "WORLD_SIZE" in os.environ:
        backend = "nccl" if args.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=args.dist_timeout))


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
    total = torch.tensor(values, dtype=torch.float64, device=args.device)
    if dist.is_initialized():
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


def to_device(args: argparse.Namespace, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch on `args.device`; to a GPU from pinned memory, so that copying does not block."""
    if args.device.type == "cpu":
        return batch
    return {key: t.pin_memory().to(args.device, non_blocking=True) for key, t in batch.items()}


def peak_memory_gb(args: argparse.Namespace) -> float:
    """Largest memory use so far in 1e9 bytes: of the GPU's allocator, or of the process."""
    if args.device.type == "cuda":
        return torch.cuda.max_memory_allocated(args.device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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
