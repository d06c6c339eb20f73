"""Layers with a frozen weight and a trained low-rank update (Hu et al. 2021, arXiv:2106.09685).

    h = W0 x + scaling · B A dropout(x)        scaling = lora_alpha / r        (section 4.1)

W0      base weight, frozen: `weight`, (out, in), with fan_in_fan_out (in, out)
A, B    the adapter: `lora_A` (r, in), `lora_B` (out, r), all that is trained; at first BA = 0
r       rank; 0 leaves the plain torch layer with its plain keys
delta   scaling · BA in the shape of W0
thin    the forward that trains: two narrow products beside the frozen layer, no delta
merged  `weight` shows W0 + delta, a tensor of its own; W0 remains the parameter and is not touched

`use_rslora` makes the scaling lora_alpha / √r (rsLoRA; Kalajdzievski 2023, arXiv:2312.03732).
Linear and MergedLinear come in four kinds, `kind`:

lora     as above
lora_fa  A stays as drawn, B alone is trained (LoRA-FA; Zhang et al. 2023, arXiv:2308.03303)
dora     each row of W0 + delta is brought to a trained length, `lora_magnitude` (out,), which
         starts as that of W0's row (DoRA; Liu et al. 2024, arXiv:2402.09353, equation 5)
pissa    A and B start as the first r singular directions of W0, from which their product at the
         start, `lora_A0` and `lora_B0`, frozen, is taken away again (PiSSA; Meng et al. 2024,
         arXiv:2404.02948, section 3)

What dora and pissa take from W0 they take in `start_from_base()`, to be called when it is loaded.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import check_kind, check_numbers, scaling


def _up(h: Tensor, b: Tensor) -> Tensor:
    """B h: (..., r) → (..., out). The copy of B makes backward on a CPU several times faster."""
    return h @ b.T.contiguous()


class LoRALayer:
    """What all layers share. A layer adds: frozen(x, weight), the torch layer with this weight;
    adapter(x), which is scaling · B(A(x)) in the adapter's dtype, or adapt(h, x); delta(a, b).

    While merged, the instance attribute `weight` hides the parameter of that name, so parameters(),
    state_dict() and optimizers always see W0. The merged tensor serves where no gradient can be
    asked for (no_grad, inference_mode), so a training step in eval mode still trains A and B, and
    not under torch.compile, whose graphs cannot see it age. It is rebuilt once W0, A, B or scaling
    have changed; writes through `.data` alone go unseen, until the next eval() or merge().
    """

    kind = "lora"
    merged = False
    _merged_from: tuple[tuple, tuple[Tensor, ...]] | None = None

    def _add_adapter(
        self,
        a: tuple[int, int],
        b: tuple[int, int],
        limit: int,
        r: int,
        alpha: float,
        p: float,
        use_rslora: bool,
    ) -> None:
        """Make A and B of these shapes, or neither if they are empty; warn if r is above limit."""
        check_numbers(r, alpha, p)
        self.r, self.lora_alpha, self.use_rslora = r, alpha, use_rslora
        self.scaling = scaling(r, alpha, use_rslora)
        self.lora_dropout = nn.Dropout(p) if p else nn.Identity()
        if 0 in a:
            return
        if r > limit:
            warnings.warn(f"r={r} is above {limit}, the most that saves anything", stacklevel=3)
        self.lora_A = nn.Parameter(self.weight.new_empty(a))
        self.lora_B = nn.Parameter(self.weight.new_empty(b))
        self.weight.requires_grad = False
        self._reset_adapter()

    def _reset_adapter(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def reset_parameters(self) -> None:
        """Unmerge, draw W0 and the bias as torch does, start the adapter afresh."""
        self.unmerge()
        super().reset_parameters()
        if self.adapted:
            self._reset_adapter()

    def start_from_base(self) -> None:
        """Nothing, where the kind takes nothing from W0."""

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter: r > 0 and, in MergedLinear, a part enabled."""
        return hasattr(self, "lora_A")

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """Tensors of the adapter that are kept with it and not trained."""
        return {"lora_fa": ("lora_A",), "pissa": ("lora_A0", "lora_B0")}.get(self.kind, ())

    @property
    def base_weight(self) -> Tensor:
        """W0, whatever `weight` shows."""
        return self._parameters["weight"] if self.merged else self.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.merged and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if self._merged_from is None or self._merged_from[0] != self._fingerprint():
                self.merge()
            return self.frozen(x, self.weight)
        return self.thin(x) if self.adapted else self.frozen(x, self.weight)

    def thin(self, x: Tensor) -> Tensor:
        """frozen(x) + scaling · B(A(dropout(x)))"""
        return self.adapt(self.frozen(x, self.base_weight), x)

    def adapt(self, h: Tensor, x: Tensor) -> Tensor:
        """What the adapter makes of h, the frozen layer's output for x."""
        return h + self.adapter(self.lora_dropout(x)).to(h.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Show W0 + delta as `weight`: summed in fp32 or wider, rounded once, anew at each call."""
        if not self.adapted:
            return
        base, *adapter = sources = self._sources()
        self.merged = True
        if any(tensor.is_meta for tensor in sources):
            return  # nothing to add yet; the first forward after loading merges
        wide = torch.promote_types(base.dtype, torch.float32)
        with torch.autocast(base.device.type, enabled=False):
            merged = self.folded(base.to(wide), *(tensor.to(wide) for tensor in adapter))
        self.__dict__["weight"] = merged.to(base.dtype)
        self._merged_from = self._fingerprint(), sources  # held, or another could get their ids

    def folded(self, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """W0 + delta"""
        return base + self.delta(a, b)

    @torch.no_grad()
    def update(self) -> Tensor:
        """By how much merging changes W0, in its shape and in float64."""
        base, *adapter = (tensor.double() for tensor in self._sources())
        return self.folded(base, *adapter) - base

    def unmerge(self) -> None:
        """Show W0 as `weight` again, bit for bit: nothing was ever written to it."""
        if self.merged:
            self.__dict__.pop("weight", None)
            self.merged, self._merged_from = False, None

    def _sources(self) -> tuple[Tensor, ...]:
        return self._parameters["weight"], self.lora_A, self.lora_B

    def _fingerprint(self) -> tuple:
        versions = ((id(t), 0 if t.is_inference() else t._version) for t in self._sources())
        return self.scaling, *versions

    def train(self, mode: bool = True) -> "LoRALayer":
        """Unmerge for training; merge for evaluation if `merge_weights`."""
        super().train(mode)
        if mode:
            self.unmerge()
        elif self.merge_weights:
            self.merge()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> "LoRALayer":  # .to(), .half(), .cuda() …
        super()._apply(*args, **kwargs)
        if self.merged:
            self.merge()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.merged:
            self.merge()


class Linear(LoRALayer, nn.Linear):
    """nn.Linear and an adapter: (..., in) → (..., out)."""

    enable_lora: Sequence[bool] = (True,)  # one part, the whole output
    fan_in_fan_out = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        use_rslora: bool = False,
        kind: str = "lora",
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, **kwargs)
        check_kind(kind)
        self.fan_in_fan_out, self.kind = fan_in_fan_out, kind
        if fan_in_fan_out:
            self.weight = nn.Parameter(self.weight.detach().T.contiguous())
        self.merge_weights = merge_weights
        n, self.part = sum(self.enable_lora), out_features // len(self.enable_lora)
        a, b, limit = (r * n, in_features), (self.part * n, r), min(in_features, self.part)
        self._add_adapter(a, b, limit, r, lora_alpha, lora_dropout, use_rslora)
        if self.adapted:
            self._add_kind()

    def _add_kind(self) -> None:
        self.lora_A.requires_grad = self.kind != "lora_fa"
        if self.kind == "dora":
            self.lora_magnitude = nn.Parameter(self.weight.new_empty(len(self.lora_B)))
            self.start_from_base()
        if self.kind == "pissa":  # until start_from_base() a pair that adds nothing
            self.lora_A0 = nn.Parameter(torch.zeros_like(self.lora_A), requires_grad=False)
            self.lora_B0 = nn.Parameter(torch.zeros_like(self.lora_B), requires_grad=False)

    @torch.no_grad()
    def start_from_base(self) -> None:
        """Set what the kind takes from W0: the lengths of its rows, or its singular directions."""
        if self.base_weight.is_meta:
            return
        if self.kind == "dora":
            self.lora_magnitude.copy_(self._row_lengths(self.base_weight, self.lora_A, self.lora_B))
        if self.kind == "pissa":
            rows = self._rows(self.base_weight)
            for i, a, b in self._enabled(self.lora_A, self.lora_B, 0):
                u, s, v = torch.linalg.svd(rows[i].float(), full_matrices=False)
                root = (s[: self.r] / self.scaling).sqrt()
                a.copy_(root[:, None] * v[: self.r])
                b.copy_(u[:, : self.r] * root)
            self.lora_A0.copy_(self.lora_A)
            self.lora_B0.copy_(self.lora_B)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.fan_in_fan_out:  # nn.Linear has taken the wrong side for the fan-in
            bound = self.in_features**-0.5
            for parameter in (self.weight,) if self.bias is None else (self.weight, self.bias):
                nn.init.uniform_(parameter, -bound, bound)
        if self.adapted:
            self.start_from_base()

    def _enabled(self, a: Tensor, b: Tensor, dim: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number, A_i (or A_i x) and B_i of each enabled part."""
        numbers = (i for i, enabled in enumerate(self.enable_lora) if enabled)
        return zip(numbers, a.split(self.r, dim), b.split(self.part), strict=True)

    def _rows(self, weight: Tensor) -> tuple[Tensor, ...]:
        """A weight in parts, each (part, in)."""
        return (weight.T if self.fan_in_fan_out else weight).split(self.part)

    def frozen(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.T if self.fan_in_fan_out else weight, self.bias)

    def plus(self, h: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """h + scaling · B(A(x))"""
        return h + _up(self.scaling * F.linear(x.to(a.dtype), a), b).to(h.dtype)

    def adapt(self, h: Tensor, x: Tensor) -> Tensor:
        """h + scaling · B(A(dropout(x))), and what the kind makes of it"""
        if self.kind == "pissa":
            h = self.plus(h, x, self.lora_A0, -self.lora_B0)
        h = self.plus(h, self.lora_dropout(x), self.lora_A, self.lora_B)
        return self._stretched(h) if self.kind == "dora" else h

    def _stretched(self, h: Tensor) -> Tensor:
        gains = self._gains(self.base_weight, self.lora_A, self.lora_B, self.lora_magnitude)
        bare = h if self.bias is None else h - self.bias
        return h + ((gains - 1) * bare).to(h.dtype)

    def _gains(self, base: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
        """By what DoRA multiplies each output, (out,): 1 where there is no adapter. The rows'
        lengths count as constants (section 4.3)."""
        gains = list(magnitude.new_ones(self.out_features).split(self.part))
        lengths = self._row_lengths(base.detach(), a.detach(), b.detach())
        enabled = (i for i, enabled in enumerate(self.enable_lora) if enabled)
        for i, gain in zip(enabled, (magnitude / lengths).split(self.part), strict=True):
            gains[i] = gain
        return torch.cat(gains)

    def _row_lengths(self, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Of W0 + delta in the enabled parts, (part · enabled,), without making delta:
        ‖w + s bA‖² = ‖w‖² + 2 s b·(A w) + s² b·(AAᵀ b) for a row w of W0 and b of B."""
        parts, squares = self._rows(base), []
        with torch.autocast(base.device.type, enabled=False):
            for i, a_i, b_i in self._enabled(a, b, 0):
                rows = parts[i].to(a_i.dtype)
                own = torch.linalg.vector_norm(rows, dim=1).square()
                cross = (rows @ a_i.T * b_i).sum(dim=1)
                update = (b_i @ (a_i @ a_i.T) * b_i).sum(dim=1)
                squares.append(own + 2 * self.scaling * cross + self.scaling**2 * update)
        return torch.cat(squares).clamp(min=torch.finfo(a.dtype).tiny).sqrt()

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        update = self.scaling * (b @ a)
        return update.T if self.fan_in_fan_out else update

    def folded(self, base: Tensor, a: Tensor, b: Tensor, *more: Tensor) -> Tensor:
        """The weight that does what `thin` does; `more` is what the kind adds to A and B."""
        weight = base + self.delta(a, b)
        if self.kind == "pissa":
            weight = weight - self.delta(*more)
        if self.kind == "dora":
            gains = self._gains(base, a, b, *more)
            weight = weight * (gains if self.fan_in_fan_out else gains[:, None])
        return weight

    def _sources(self) -> tuple[Tensor, ...]:
        more = {"dora": ("lora_magnitude",), "pissa": ("lora_A0", "lora_B0")}.get(self.kind, ())
        return *super()._sources(), *(getattr(self, name) for name in more)


class MergedLinear(Linear):
    """A Linear whose output is len(enable_lora) equal parts; each enabled part has its own adapter.

    A stacks their A_i, (r · enabled, in), and B their B_i, (part · enabled, r). GPT-2's query, key
    and value are such a layer: [True, False, True] adapts query and value.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        if len(enable_lora) == 0 or out_features % len(enable_lora):
            raise ValueError(f"{enable_lora=} must cut {out_features=} into equal parts")
        self.enable_lora = [bool(enabled) for enabled in enable_lora]
        settings = r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights
        super().__init__(in_features, out_features, *settings, **kwargs)

    def plus(self, h: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """h, and in each enabled part's columns + scaling · B_i(A_i(x))"""
        parts = list(h.split(self.part, dim=-1))
        down = self.scaling * F.linear(x.to(a.dtype), a)  # (..., r · enabled)
        for i, down_i, b_i in self._enabled(down, b, -1):
            parts[i] = parts[i] + _up(down_i, b_i).to(h.dtype)
        return torch.cat(parts, dim=-1)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        parts = list(a.new_zeros(self.out_features, self.in_features).split(self.part))
        for i, a_i, b_i in self._enabled(a, b, 0):
            parts[i] = self.scaling * (b_i @ a_i)
        return torch.cat(parts).T if self.fan_in_fan_out else torch.cat(parts)


class Embedding(LoRALayer, nn.Embedding):
    """nn.Embedding and an adapter: ids (...) → (..., dim). A is zero at the start, B normal.

    The adapter's gradient is dense, also with `sparse`. `max_norm` bounds rows of W0, not of the
    sum that is looked up, and rewrites them in forward: it is refused beside an adapter.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        if r and self.max_norm is not None:
            raise ValueError(f"max_norm={self.max_norm} does not go with an adapter, {r=}")
        self.merge_weights = merge_weights
        a, b, limit = (r, num_embeddings), (embedding_dim, r), min(num_embeddings, embedding_dim)
        self._add_adapter(a, b, limit, r, lora_alpha, 0.0, use_rslora)

    def _reset_adapter(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def frozen(self, x: Tensor, weight: Tensor) -> Tensor:
        options = self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        return F.embedding(x, weight, self.padding_idx, *options)

    def adapter(self, x: Tensor) -> Tensor:
        a = self.lora_A.T
        rows = F.embedding(x, a, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return _up(self.scaling * rows, self.lora_B)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        return self.scaling * (b @ a).T


class _ConvLoRA(LoRALayer):
    """A convolution and one with delta for its kernel: (B, in, *grid) → (B, out, *grid).

    With k the kernel's last side, A is (r · k, in · k) and B (out / groups · other sides, r · k):
    BA has as many numbers as W0, whatever the kernel and the groups, and takes its shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)
        self.merge_weights = merge_weights
        *sides, k = self.kernel_size
        columns, rows = in_channels * k, out_channels // self.groups * math.prod(sides)
        a, b, limit = (r * k, columns), (rows, r * k), self.weight.numel() // (k * (columns + rows))
        self._add_adapter(a, b, limit, r, lora_alpha, lora_dropout, use_rslora)

    def frozen(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)

    def adapter(self, x: Tensor) -> Tensor:
        kernel = self.delta(self.lora_A, self.lora_B)
        return self._conv_forward(x.to(kernel.dtype), kernel, None)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        return self.scaling * (b @ a).view(self.base_weight.shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):  # loralib 0.1.2 kept the convolution in a child, `conv`
            if f"{prefix}conv.{name}" in state_dict:
                state_dict[prefix + name] = state_dict.pop(f"{prefix}conv.{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Conv1d(_ConvLoRA, nn.Conv1d):
    """nn.Conv1d and an adapter."""


class Conv2d(_ConvLoRA, nn.Conv2d):
    """nn.Conv2d and an adapter."""


class Conv3d(_ConvLoRA, nn.Conv3d):
    """nn.Conv3d and an adapter."""
