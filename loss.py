"""The label-smoothed language-model loss, with its gradient made on the way."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class SmoothedCrossEntropy(torch.autograd.Function):
    """Σᵢ wᵢ · ((1 - e) · nllᵢ + e · mean over V of -log pᵢ) of logits hidden · headᵀ, and
    Σᵢ wᵢ · nllᵢ, which has no gradient.

    With p the softmax and y the label, the gradient by the logits is w · (p - (1 - e) · 1_y - e/V)
    (Szegedy et al. 2016, section 7). It is written over the logits in the forward pass, so that one
    tensor of N × V numbers is all that is ever held; autograd would hold four.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, e: float
    ) -> tuple[Tensor, Tensor]:
        """`hidden` (N, C), `head` (V, C), `labels` (N,) int64, `weights` (N,): scalars in fp32."""
        logits = (head @ hidden.T).float()  # (V, N): twice as fast as (N, V) for large V, small N
        rows = torch.arange(len(labels), device=labels.device)
        own, mean = logits[labels, rows], logits.mean(dim=0)
        top = logits.amax(dim=0)
        total = logits.sub_(top).exp_().sum(dim=0)
        normalizer = total.log() + top
        losses = normalizer - (1 - e) * own - e * mean

        gradient = logits.mul_(weights / total)
        if e:
            gradient.sub_(weights * (e / head.size(0)))
        gradient[labels, rows] -= (1 - e) * weights
        gradient = gradient.to(hidden.dtype)
        by_hidden = (head.T @ gradient).T if ctx.needs_input_grad[0] else None
        by_head = gradient @ hidden if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(by_hidden, by_head)
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
        weights: (N,), above 0.
    """
    weights = weights.float()
    total, plain = SmoothedCrossEntropy.apply(hidden, head, labels, weights, label_smooth)
    count = weights.sum().clamp(min=torch.finfo().tiny)
    return total / count, plain / count
