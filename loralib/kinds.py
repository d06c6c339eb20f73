"""The kinds of an adapter: one small class each, which says how it differs from plain LoRA.

A kind answers for a layer: which tensors it has besides A and B, where they start, what the forward
pass computes, what the merged weight is, and how large the update is. `layer.parts(a, b)` gives the
A and B of each adapted part of the output: several in a MergedLinear, one elsewhere. A new kind is
a new class here and an entry in KINDS.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .layers import LoRALayer


class Lora:
    """W0 x + scaling · B A dropout(x) (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

    extra: tuple[str, ...] = ()  # names of the adapter's tensors besides lora_A and lora_B
    frozen: tuple[str, ...] = ()  # names of those that are kept with it and not trained

    def add_tensors(self, layer: "LoRALayer") -> None:
        """Make the extra tensors of a new layer."""

    def start_from_base(self, layer: "LoRALayer") -> None:
        """Set what starts from the values of W0."""

    def forward(self, layer: "LoRALayer", h: Tensor, x: Tensor) -> Tensor:
        """The layer's output for x, given that of the frozen layer, h = W0 x + bias."""
        return layer.add_update(h, layer.lora_dropout(x), layer.lora_A, layer.lora_B)

    def merged_weight(
        self, layer: "LoRALayer", base: Tensor, a: Tensor, b: Tensor, *extra: Tensor
    ) -> Tensor:
        """The weight that does what `forward` does without dropout, in the shape of W0."""
        return base + layer.delta_weight(a, b)

    def factors(self, layer: "LoRALayer") -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each adapted part its number, A (k, in) and B (part, k), scaling · BA its update."""
        return layer.parts(layer.lora_A, layer.lora_B)

    def update_norm(self, layer: "LoRALayer") -> float:
        """The Frobenius norm of merged weight - W0, without making either: traces of k x k
        matrices, ‖BA‖² = tr(BᵀB · AAᵀ), in float64."""
        square = 0.0
        for _, a, b in self.factors(layer):
            a, b = a.cpu().double(), b.cpu().double()
            square += float(((b.T @ b) * (a @ a.T)).sum())
        return layer.scaling * max(square, 0.0) ** 0.5


class LoraFA(Lora):
    """LoRA whose A stays as drawn (Zhang et al. 2023, arXiv:2308.03303)."""

    frozen = ("lora_A",)


class Dora(Lora):
    """Each row of W0 + scaling · BA brought to a trained length, `lora_magnitude` (out,), which
    starts as that of W0's row (Liu et al. 2024, arXiv:2402.09353, equation 5)."""

    extra = ("lora_magnitude",)

    def add_tensors(self, layer: "LoRALayer") -> None:
        layer.lora_magnitude = nn.Parameter(layer.weight.new_empty(len(layer.lora_B)))
        layer.start_from_base()

    def start_from_base(self, layer: "LoRALayer") -> None:
        a, b, magnitude = layer.adapter_tensors()
        magnitude.copy_(self._row_lengths(layer, layer.base_weight, a, b))

    def forward(self, layer: "LoRALayer", h: Tensor, x: Tensor) -> Tensor:
        h = super().forward(layer, h, x)
        gains = self._gains(layer, layer.base_weight, *layer.adapter_tensors())
        bias = getattr(layer, "bias", None)
        bare = h if bias is None else h - bias
        return h + ((gains - 1) * bare).to(h.dtype)

    def merged_weight(
        self, layer: "LoRALayer", base: Tensor, a: Tensor, b: Tensor, *extra: Tensor
    ) -> Tensor:
        gains = self._gains(layer, base, a, b, *extra)
        weight = super().merged_weight(layer, base, a, b)
        return weight * (gains if layer.fan_in_fan_out else gains[:, None])

    def update_norm(self, layer: "LoRALayer") -> float:
        """Row by row, with its gain g: ‖g (w + s bA) - w‖² = (g - 1)² ‖w‖² + 2 g (g - 1) s b·(A w)
        + g² s² b·(AAᵀ b)."""
        a, b, magnitude = layer.adapter_tensors()
        lengths, s, square = self._row_lengths(layer, layer.base_weight, a, b), layer.scaling, 0.0
        products = self._row_products(layer, layer.base_weight, a, b)
        gains = (magnitude / lengths).split(layer.part)
        for g, (own, cross, update) in zip(gains, products, strict=True):
            rows = (g - 1) ** 2 * own + 2 * g * (g - 1) * s * cross + (g * s) ** 2 * update
            square += float(rows.cpu().double().sum())
        return max(square, 0.0) ** 0.5

    def _gains(
        self, layer: "LoRALayer", base: Tensor, a: Tensor, b: Tensor, magnitude: Tensor
    ) -> Tensor:
        """What each output is multiplied by, (out,): 1 where there is no adapter. The rows' lengths
        count as constants (section 4.3)."""
        gains = [magnitude.new_ones(len(rows)) for rows in rows_by_part(layer, base)]
        lengths = self._row_lengths(layer, base.detach(), a.detach(), b.detach())
        own = (magnitude / lengths).split(layer.part)
        for (i, _, _), gain in zip(layer.parts(a, b), own, strict=True):
            gains[i] = gain
        return torch.cat(gains)

    def _row_lengths(self, layer: "LoRALayer", base: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Lengths of the rows of W0 + scaling · BA in the adapted parts, (part · parts,), without
        making it: ‖w + s bA‖² = ‖w‖² + 2 s b·(A w) + s² b·(AAᵀ b), w a row of W0 and b of B."""
        s = layer.scaling
        products = self._row_products(layer, base, a, b)
        squares = [own + 2 * s * cross + s**2 * update for own, cross, update in products]
        return torch.cat(squares).clamp(min=torch.finfo(a.dtype).tiny).sqrt()

    def _row_products(
        self, layer: "LoRALayer", base: Tensor, a: Tensor, b: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each adapted part and all its rows ‖w‖², b·(A w) and b·(AAᵀ b), (part,) each."""
        weights, products = rows_by_part(layer, base), []
        with torch.autocast(base.device.type, enabled=False):
            for i, a_i, b_i in layer.parts(a, b):
                rows = weights[i].to(a_i.dtype)
                own = torch.linalg.vector_norm(rows, dim=1).square()
                cross = (rows @ a_i.T * b_i).sum(dim=1)
                update = (b_i @ (a_i @ a_i.T) * b_i).sum(dim=1)
                products.append((own, cross, update))
        return products


class Pissa(Lora):
    """A and B start as the first r singular directions of W0, from which their product at the
    start, `lora_A0` and `lora_B0`, frozen, is taken away again (Meng et al. 2024, arXiv:2404.02948,
    section 3)."""

    extra = frozen = ("lora_A0", "lora_B0")

    def add_tensors(self, layer: "LoRALayer") -> None:
        layer.lora_A0 = nn.Parameter(torch.zeros_like(layer.lora_A))  # a pair that adds nothing
        layer.lora_B0 = nn.Parameter(torch.zeros_like(layer.lora_B))  # until start_from_base()

    def start_from_base(self, layer: "LoRALayer") -> None:
        weights = rows_by_part(layer, layer.base_weight)
        a, b, a0, b0 = layer.adapter_tensors()
        for i, a_i, b_i in layer.parts(a, b):
            u, s, v = torch.linalg.svd(weights[i].float(), full_matrices=False)
            root = (s[: layer.r] / layer.scaling).sqrt()
            a_i.copy_(root[:, None] * v[: layer.r])
            b_i.copy_(u[:, : layer.r] * root)
        a0.copy_(a)
        b0.copy_(b)

    def forward(self, layer: "LoRALayer", h: Tensor, x: Tensor) -> Tensor:
        _, _, a0, b0 = layer.adapter_tensors()
        return super().forward(layer, layer.add_update(h, x, a0, -b0), x)

    def merged_weight(
        self, layer: "LoRALayer", base: Tensor, a: Tensor, b: Tensor, *extra: Tensor
    ) -> Tensor:
        return super().merged_weight(layer, base, a, b) - layer.delta_weight(*extra)

    def factors(self, layer: "LoRALayer") -> Iterator[tuple[int, Tensor, Tensor]]:
        a, b, a0, b0 = layer.adapter_tensors()
        pairs = zip(layer.parts(a, b), layer.parts(a0, -b0), strict=True)
        for (i, a_i, b_i), (_, a0_i, b0_i) in pairs:
            yield i, torch.cat((a_i, a0_i)), torch.cat((b_i, b0_i), dim=1)


KINDS: dict[str, Lora] = {"lora": Lora(), "dora": Dora(), "pissa": Pissa(), "lora_fa": LoraFA()}


def rows_by_part(layer: "LoRALayer", weight: Tensor) -> tuple[Tensor, ...]:
    """The weight of a linear layer in its parts, each (part, in)."""
    return (weight.T if layer.fan_in_fan_out else weight).split(layer.part)
