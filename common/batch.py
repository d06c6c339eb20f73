"""What a training step computes on: sequences without padding, and what counts in their loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Where sequences lie in a row: their lengths, on the host, and, where the row is, the place at
    which each starts and the last one ends, (B + 1,) int32, for kernels that look there.

    Where what is computed on the row is recorded for other rows too, there are no lengths on the
    host, only the most that one can be.
    """

    lengths: list[int]
    starts: Tensor
    bound: int = 0

    @property
    def longest(self) -> int:
        """The length of the longest sequence, or the most that it can be."""
        return self.bound or max(self.lengths)

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """Which row of the sequences stands at each place where all are padded to the longest, and
        the place at which each row stands, (B · longest,) and (N,) int64, where the row is.

        At a place that a sequence does not fill stands a row of another.
        """
        starts, total = self.starts[:-1].long(), sum(self.lengths)
        places, numbers = (torch.arange(n, device=starts.device) for n in (self.longest, total))
        rows = (starts[:, None] + places).flatten().clamp(max=total - 1)
        shifts = self.longest * torch.arange(len(starts), device=starts.device) - starts
        # With its size known, nothing has to be read from a device.
        return rows, numbers + shifts.repeat_interleave(self.starts.diff(), output_size=total)

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Spans":
        """Return the spans of sequences of these lengths, one after the other, on the host."""
        return cls(list(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))

    def after(self, rows: int) -> "Spans":
        """Return the spans that the sequences have once this number of rows stands before each."""
        more = rows * torch.arange(len(self.starts), dtype=torch.int32, device=self.starts.device)
        return Spans([rows + length for length in self.lengths], self.starts + more)

    def to(self, device: torch.device) -> "Spans":
        """Return the spans with their starts on a device."""
        return replace(self, starts=self.starts.to(device))


@dataclass(frozen=True)
class Batch:
    """B sequences, one after the other in one row of N tokens, and the M positions that count.

    The collation makes all of it on the host and it is sent once, so that no part of a step has to
    ask a device how long something is. The lengths and `count` stay on the host.
    """

    input_ids: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, of each token in its sequence, from 0
    spans: Spans
    counted: Tensor  # (M,) int64, which of the N count, ascending
    targets: Tensor  # (M,) int64, the token that follows each of these
    weights: Tensor  # (M,), of each in the loss, above 0; 0 where a batch was filled up
    count: float  # the sum of the weights

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch, always in the same order."""
        return [self.spans.starts, *(t for t in vars(self).values() if isinstance(t, Tensor))]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with the function applied to each of its tensors."""
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        mapped: dict[str, Any] = {name: function(tensor) for name, tensor in tensors.items()}
        spans = replace(self.spans, starts=function(self.spans.starts))
        return replace(self, spans=spans, **mapped)

    def filled(self, multiple: int) -> "Batch":
        """Return the batch, which is on the host, with multiples of a number as N and M, so that
        few sizes occur: with one more sequence of up to that many tokens, of which none counts."""
        room, more = multiple - len(self.input_ids) % multiple, -len(self.counted) % multiple
        return replace(
            self,
            input_ids=F.pad(self.input_ids, (0, room)),
            positions=F.pad(self.positions, (0, room)),
            spans=Spans.of([*self.spans.lengths, room]),
            counted=F.pad(self.counted, (0, more), value=len(self.input_ids)),
            targets=F.pad(self.targets, (0, more)),
            weights=F.pad(self.weights, (0, more)),
        )

    @classmethod
    def from_padded(cls, input_ids: Tensor, labels: Tensor, mask: Tensor | None) -> "Batch":
        """Return the batch of right-padded rows (B, T), their labels and the weights of these.

        What follows the last position that counts in a row has no part in the loss and is left
        out. A first position is always kept: a rank without rows must still have gradients, of
        zero. The selection runs where the tensors are, so it waits for their device.
        """
        mask = torch.ones(labels.shape, device=labels.device) if mask is None else mask
        counted = mask > 0
        places = torch.arange(1, mask.size(1) + 1, device=mask.device)
        ends = (counted * places).amax(dim=1).clamp(min=1)
        real = places <= ends[:, None]
        weights = mask[counted]
        return cls(
            input_ids=input_ids[real],
            positions=(places - 1).expand_as(real)[real],
            spans=Spans.of(ends.tolist()).to(mask.device),
            counted=counted[real].nonzero()[:, 0],
            targets=labels[counted],
            weights=weights,
            count=float(weights.sum()),
        )
