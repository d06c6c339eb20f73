"""What a training step computes on: sequences without padding, and what counts in their loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Where sequences lie in a row: their lengths, on the host, and, where the row is, the place at
    which each starts and the last one ends, (B + 1,) int32, for kernels that look there."""

    lengths: list[int]
    starts: Tensor

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
    weights: Tensor  # (M,), of each in the loss, above 0
    count: float  # the sum of the weights

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with the function applied to each of its tensors."""
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        mapped: dict[str, Any] = {name: function(tensor) for name, tensor in tensors.items()}
        spans = replace(self.spans, starts=function(self.spans.starts))
        return replace(self, spans=spans, **mapped)

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
