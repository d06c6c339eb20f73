"""Attention of sequences that lie one after the other in a row, by torch's variable-length kernel.

It is there since torch 2.10, for halves on CUDA; elsewhere `is_possible` says no.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
AMPERE = 8  # the first capability that the kernel is written for
WIDEST = 256  # head, a multiple of 8


def is_possible(row: Tensor, width: int) -> bool:
    """Whether the kernel takes a row of this dtype on this device, with heads of this width."""
    if not row.is_cuda or row.dtype not in HALVES or width % 8 or width > WIDEST:
        return False
    return _capability(row.device.index) >= AMPERE and _kernel() is not None


def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Causal attention of each sequence to itself.

    Args:
        query, key, value: (N, H, D), fp16 or bf16.
        starts: (B + 1,) int32, where each sequence starts and the last one ends.
        longest: the length of the longest, or more.

    Returns:
        (N, H, D).
    """
    kernel = _kernel()
    assert kernel is not None, "is_possible() was not asked"
    return kernel(query, key, value, starts, starts, longest, longest)


@cache
def _capability(device: int) -> int:
    """The major compute capability; 0 on AMD's GPUs, which CUDA's kernels are not for."""
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


@cache
def _kernel() -> Callable[..., Any] | None:
    """The causal kernel; how causality is asked for differs between releases of torch."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    named = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in named else {"window_size": (-1, 0)}
    return partial(cast(Any, varlen_attn), **causal)
