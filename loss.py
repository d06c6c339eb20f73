"""The label-smoothed language-model loss, with its gradient made on the way."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# On a CPU: positions in multiples of 16, as products of other sizes are up to twice as slow, and
# logits of 8,192 tokens at a time, which stay in the cache until they have served.
POSITIONS, TOKENS = 16, 8192


class SmoothedCrossEntropy(torch.autograd.Function):
    """Σᵢ wᵢ · ((1 - e) · nllᵢ + e · mean over V of -log pᵢ) of logits hidden · headᵀ, and
    Σᵢ wᵢ · nllᵢ, which has no gradient.

    With p the softmax and y the label, the gradient by the logits is w · (p - (1 - e) · 1_y - e/V)
    (Szegedy et al. 2016, section 7). It is written over the logits in the forward pass, so that
    N × V numbers are all that is ever held; autograd would hold four times as many. The vocabulary
    is taken part by part, each with a maximum of its own until the sum of all is known (Milakov and
    Gimelshein 2018, arXiv:1805.02867).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, e: float
    ) -> tuple[Tensor, Tensor]:
        """`hidden` (N, C), `head` (V, C), `labels` (N,) int64, `weights` (N,): scalars in fp32."""
        count, size = len(hidden), TOKENS if head.device.type == "cpu" else len(head)
        room = -count % POSITIONS
        hidden = F.pad(hidden, (0, 0, 0, room))
        labels, weights = F.pad(labels, (0, room)), F.pad(weights, (0, room))
        rows = torch.arange(len(labels), device=labels.device)
        parts = head.split(size)
        # Each label's place in the part that holds it; elsewhere 0, where nothing is added.
        places = labels - size * torch.arange(len(parts), device=labels.device)[:, None]
        held = (places >= 0) & (places < size)
        places = places.where(held, 0)

        own, mean = torch.zeros_like(weights), torch.zeros_like(weights)
        exponentials, tops, sums = [], [], []
        for part, place, here in zip(parts, places, held, strict=True):
            logits = (part @ hidden.T).float()  # (v, N): (N, v) is slower on a CPU
            own += logits[place, rows].where(here, 0)
            mean += logits.sum(dim=0) / len(head)
            tops.append(logits.amax(dim=0))
            exponentials.append(logits.sub_(tops[-1]).exp_())
            sums.append(exponentials[-1].sum(dim=0))
        top = torch.stack(tops)
        normalizer = (top + torch.stack(sums).log()).logsumexp(dim=0)
        losses = normalizer - (1 - e) * own - e * mean

        by_hidden, by_head = (
            torch.zeros_like(tensor, dtype=torch.float32) if needed else None
            for tensor, needed in zip((hidden, head), ctx.needs_input_grad[:2], strict=True)
        )
        if by_hidden is not None or by_head is not None:
            scales = weights * (top - normalizer).exp()
            of_label, of_all = (1 - e) * weights * held, weights * (e / len(head))
            for number, part in enumerate(parts):
                gradient = exponentials[number].mul_(scales[number])
                if e:
                    gradient.sub_(of_all)
                gradient[places[number], rows] -= of_label[number]
                gradient = gradient.to(hidden.dtype)
                if by_hidden is not None:
                    by_hidden += gradient.T @ part
                if by_head is not None:
                    by_head[number * size :][: len(part)] = gradient @ hidden
        ctx.save_for_backward(by_hidden if by_hidden is None else by_hidden[:count], by_head)
        plain = ((normalizer - own) * weights).sum()
        ctx.mark_non_differentiable(plain)
        return (losses * weights).sum(), plain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_head = (g if g is None else scale * g for g in ctx.saved_tensors)
        return by_hidden, by_head, None, None, None


def smoothed_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, label_smooth: float
) -> tuple[Tensor, Tensor]:
    """Weighted means of the label-smoothed loss and, without a gradient, of the loss without
    smoothing; 0 where nothing has weight. Scalars in fp32.

    Args:
        hidden: (N, C) of the counted positions.
        head: (V, C), the tied embedding.
        labels: (N,) int64.
        weights: (N,), 0 or above.
    """
    weights = weights.float()
    total, plain = SmoothedCrossEntropy.apply(hidden, head, labels, weights, label_smooth)
    count = weights.sum().clamp(min=torch.finfo().tiny)
    return total / count, plain / count
