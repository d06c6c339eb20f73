"""Where a program runs: device, precision, and which process of how many this is.

Everything works alike with one process, where the collective methods have nothing to do.
"""

import argparse
import ctypes
import os
import random
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import process_group
from common.batch import Batch
from common.errors import InputError

T = TypeVar("T")
OTHER_PLATFORMS = ("azure", "philly", "k8s")
DEVICES = ("auto", "cpu", "cuda", "mps")
AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Runtime:
    """The device and precision that a process computes with, and its place among the others."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    precision: str = "fp32"  # or bf16, fp16

    def sum(self, *values: float) -> list[float]:
        """Return each number summed over all ranks, in float64."""
        if not dist.is_initialized():
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_on_device(self, *values: float) -> Tensor:
        """Return each number summed over all ranks, in float64 where the device has it; neither
        the host nor the device waits for the other."""
        # torch.full is a kernel with a number, which is cheaper than sending a tensor.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.stack([torch.full((), v, dtype=dtype, device=self.device) for v in values])
        if dist.is_initialized():
            dist.all_reduce(total)
        return total

    def gather(self, value: object) -> list:
        """Return the `value`s of all ranks in rank order, on every rank; any picklable type."""
        if not dist.is_initialized():
            return [value]
        gathered: list = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def from_first(self, make: Callable[[], T]) -> T:
        """Return on every rank what `make` gives on rank 0, or raise its InputError on every one.

        All ranks wait for it.
        """
        answer: T | InputError | None = None
        if self.rank == 0:
            try:
                answer = make()
            except InputError as error:
                answer = error
        answer = self.gather(answer)[0]
        if isinstance(answer, InputError):
            raise answer
        return answer

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if dist.is_initialized():
            dist.barrier()

    def autocast(self) -> AbstractContextManager:
        """Return the mixed-precision context of this precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, AUTOCAST[self.precision])

    def to_device(self, batch: Batch) -> Batch:
        """Return the batch on the device; to CUDA from pinned memory, so that nothing waits."""
        if self.device.type == "cpu":
            return batch
        if self.device.type != "cuda":
            return batch.map(lambda tensor: tensor.to(self.device))
        return batch.map(lambda tensor: tensor.pin_memory().to(self.device, non_blocking=True))

    def fill(self, own: Tensor, given: Tensor) -> None:
        """Copy a tensor on the host over one on the device, as `to_device` does."""
        own.copy_(given.pin_memory() if own.is_cuda else given, non_blocking=True)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model as it is trained: itself, or in DistributedDataParallel in a group."""
        if not dist.is_initialized():
            return model
        devices = [self.local_rank] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def peak_memory_gb(self) -> float:
        """Return the largest memory use so far in 1e9 bytes: CUDA's allocator's, or the process's;
        0 where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return peak_resident_bytes() / 1e9


def add_gpu_params(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `parse_gpu` reads."""
    add = parser.add_argument_group("where it runs").add_argument
    add(
        "--device",
        default="auto",
        help=f"One of {', '.join(DEVICES)}; auto, the default, is cuda where there is one and cpu "
        "elsewhere.",
    )
    add("--bf16", action="store_true", help="Computes in bfloat16 where it can (autocast).")
    add("--fp16", action="store_true", help="Computes in float16, with loss scaling; CUDA only.")
    add("--random_seed", type=int, default=110, help="Default: 110.")
    add(
        "--deterministic",
        action="store_true",
        help="Uses only algorithms that give the same bits each time, which is slower on a GPU.",
    )
    add(
        "--dist_timeout",
        type=float,
        default=1800,
        help="Seconds that a rank waits for the others before it gives up. Default: 1800.",
    )
    add("--platform", default="local", help="Only local works, also under torchrun.")
    add("--local_rank", "--local-rank", type=int, help="Set by the launcher.")


def parse_gpu(args: argparse.Namespace) -> Runtime:
    """Return where this process runs, by its flags and its launcher's variables, once it has met
    the others of its group; with one process there is none to meet.

    Raises:
        InputError: the platform, device or precision is not available here, or the launcher's
            variables are broken.
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
    place = process_group.read_place(args.local_rank)
    device = _choose_device(args.device, place)
    precision = _choose_precision(args.fp16, args.bf16, device)
    if device.type == "cpu":
        reuse_freed_memory()
    if args.deterministic:
        _be_deterministic()
    if place.world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        process_group.join(place, backend, args.dist_timeout)
    return Runtime(device, place.rank, place.world_size, place.local_rank, precision)


def _choose_device(name: str, place: process_group.Place) -> torch.device:
    if name not in DEVICES:
        raise InputError(f"--device {name} is unknown; give one of {', '.join(DEVICES)}")
    if name == "mps":
        return _choose_mps(place)
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here; leave the flag out")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {place.local_rank} has no GPU: this machine has "
            f"{torch.cuda.device_count()}; start no more processes than that (--nproc_per_node)"
        )
    torch.cuda.set_device(place.local_rank)
    # torch's first choice of attention on new GPUs takes tens of milliseconds to plan a new shape,
    # and nearly every batch has one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", place.local_rank)


def _choose_mps(place: process_group.Place) -> torch.device:
    if not torch.backends.mps.is_available():
        raise InputError(
            "--device mps: PyTorch sees no Apple GPU here; it needs macOS on Apple silicon and a "
            "PyTorch built for it, or leave the flag out"
        )
    if place.world_size > 1:
        raise InputError("--device mps is one device; start one process, without torchrun")
    return torch.device("mps")


def _choose_precision(fp16: bool, bf16: bool, device: torch.device) -> str:
    if fp16 and bf16:
        raise InputError("--fp16 and --bf16 exclude each other; give one")
    if fp16 and device.type == "cpu":
        raise InputError("--fp16 needs a CUDA device; on a CPU give --bf16 or nothing")
    if (fp16 or bf16) and device.type == "mps":
        raise InputError("--device mps computes in fp32 here; leave --fp16 and --bf16 out")
    return "fp16" if fp16 else "bf16" if bf16 else "fp32"


def _be_deterministic() -> None:
    """Let operations without a deterministic form raise from now on. A CPU needs none of this."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def reuse_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, where it would hand all large
    ones back to the system: a training step on a CPU then has no page faults, where it had 30,000
    for gpt2.sm, and is about a tenth faster. With another C library nothing changes."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows has no library None
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def no_sync(model: nn.Module, skip: bool) -> AbstractContextManager:
    """Return a context for forward and backward in which gradients stay on their rank if `skip`."""
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def distributed_opt(runtime: Runtime, model: nn.Module) -> nn.Module:
    """Return the model as it is trained, `Runtime.wrap` under the original's name."""
    return runtime.wrap(model)


def distributed_gather(runtime: Runtime, value: object) -> list:
    """Return all ranks' values, `Runtime.gather` under the original's name."""
    return runtime.gather(value)


def distributed_sync(runtime: Runtime) -> None:
    """Wait for all ranks, `Runtime.barrier` under the original's name."""
    runtime.barrier()


def cleanup(runtime: Runtime) -> None:
    """Leave the process group, under the original's name."""
    process_group.leave()


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process so far, 0 where the system does not say.

    getrusage is the second choice on Linux: its ru_maxrss survives exec, so that a program would
    report what the one that started it had.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(found[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def generator_states() -> dict:
    """Return the random generators' states of Python, NumPy and PyTorch: tensors, plain values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, cast(np.ndarray, keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_generator_states(states: dict) -> None:
    """Put back what `generator_states` gave."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if states.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
