"""The passes of a micro-batch as CUDA graphs: recorded once for each size, replayed from then on.

A step of a small model is a thousand kernels, and each takes less time than its launch by the host.
A graph launches all of them at once, with the shapes and in the memory of its recording. So a batch
is filled up to a size that occurs often and copied to where the graph reads; gradients keep their
memory, too.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.batch import Batch, Spans
from gpu import Runtime

# From a micro-batch and its share in the step to its losses, without and with smoothing; the
# gradients of share × loss with smoothing are added to the parameters'.
Passes = Callable[[Batch, Tensor], tuple[Tensor, Tensor]]
Replay = Callable[[], tuple[Tensor, Tensor]]

MULTIPLE = 64  # of tokens, and of positions that count
MOST = 128  # graphs; batches of further sizes are computed without


@dataclass(frozen=True)
class Recorded:
    """A graph, and the memory that it reads."""

    batch: Batch
    share: Tensor
    replay: Replay


class Graphs:
    """The graphs of a run, by size: tokens, counted positions, sequences.

    The first batch of a size is computed without, which also starts what cannot be recorded, as
    libraries and compilers. The second is recorded. Random numbers are drawn as without graphs.
    """

    def __init__(self, runtime: Runtime, parameters: Iterable[Tensor], longest: int) -> None:
        """`longest` is the most tokens of a sequence."""
        self.runtime = runtime
        self.bound = max(longest, MULTIPLE)
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.recorded: dict[tuple[int, ...], Recorded] = {}
        self.pool = new_pool()
        self.gradients: list[Tensor] = []
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
            self.gradients.append(parameter.grad)

    def zero_gradients(self) -> None:
        """Fill the gradients with zeros, where they are."""
        torch._foreach_zero_(self.gradients)

    def run(self, passes: Passes, batch: Batch, share: Tensor) -> tuple[Tensor, Tensor]:
        """Do the passes of a batch on the host; the losses stay until a graph is replayed again."""
        batch = batch.filled(MULTIPLE)
        size = len(batch.input_ids), len(batch.counted), len(batch.spans.starts)
        self.seen[size] += 1
        if size not in self.recorded:
            sent = self._sent(batch)
            if self.seen[size] == 1 or len(self.recorded) == MOST:
                return passes(sent, share)
            self.recorded[size] = self._record(passes, sent, share.clone())
        graph = self.recorded[size]
        for own, given in zip(graph.batch.tensors(), batch.tensors(), strict=True):
            self.runtime.fill(own, given)
        graph.share.copy_(share)
        return graph.replay()

    def _sent(self, batch: Batch) -> Batch:
        """The batch on the device, without what only this one has and must not be recorded."""
        batch = self.runtime.to_device(batch)
        spans = Spans([], batch.spans.starts, self.bound)
        return replace(batch, spans=spans, count=math.nan)

    def _record(self, passes: Passes, batch: Batch, share: Tensor) -> Recorded:
        return Recorded(batch, share, record(lambda: passes(batch, share), self.pool))


def new_pool() -> Any:
    """The memory that all graphs share, as only one of them runs at a time."""
    return torch.cuda.graph_pool_handle()


def record(work: Replay, pool: Any) -> Replay:
    """Record what the work launches, without doing it; return what does it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        losses = work()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return losses

    return replay
