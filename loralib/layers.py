"""Layers with a frozen weight and a trained low-rank update (Hu et al. 2021, arXiv:2106.09685).

    h = W0 x + scaling · B A dropout(x)        scaling = lora_alpha / r        (section 4.1)

W0      base weight, frozen: `weight`, (out, in), with fan_in_fan_out (in, out)
A, B    the adapter: `lora_A` (r, in), `lora_B` (out, r), all that is trained; at first BA = 0
r       rank; 0 leaves the plain torch layer with its plain keys
delta   scaling · BA in the shape of W0; no forward that trains makes it, but for convolutions
merged  `weight` shows W0 + delta, a tensor of its own; W0 remains the parameter and is not touched

`use_rslora` makes the scaling lora_alpha / √r (rsLoRA; Kalajdzievski 2023, arXiv:2312.03732).
Linear and MergedLinear come in the kinds of kinds.py: lora, lora_fa, dora, pissa. What dora and
pissa take from W0 they take in `start_from_base()`, to be called when it is loaded.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import check_kind, check_numbers, scaling
from .kinds import KINDS, Lora

STATE_DICT_WARNING = (
    "state_dict of a merged layer holds W0, A and B, and not their sum as in PyPI's loralib; "
    "loralib.merged_state_dict gives the weights to deploy"
)


class LoRALayer(nn.Module):
    """What all layers share: the adapter and its merging.

    A layer adds `forward`, the torch layer and then `adapt`; `add_update(h, x, a, b)`, which is
    h + scaling · B(A(x)); and `delta_weight(a, b)`, scaling · BA in the shape of W0.

    While merged, the instance attribute `weight` hides the parameter of that name, so parameters(),
    state_dict() and optimizers always see W0. The merged tensor serves where no gradient can be
    asked for (no_grad, inference_mode), so a training step in eval mode still trains A and B, and
    not under torch.compile, whose graphs cannot see it age. It is rebuilt once W0, A, B or scaling
    have changed; writes through `.data` alone go unseen, until the next eval() or merge().
    """

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    kind = "lora"
    enable_lora: Sequence[bool] = (True,)  # one part, the whole output
    fan_in_fan_out: bool  # of linear layers
    merged = False
    replaced: tuple[nn.Module, bool] | None = None  # by inject: the module, and if W0 was trained
    _merged_from: tuple[tuple, tuple[Tensor, ...]] | None = None

    def _add_adapter(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        merge_weights: bool,
        use_rslora: bool,
        *,
        inputs: int,
        part: int,
        limit: int,
        k: int = 1,
    ) -> None:
        """Make A (n · r · k, inputs) and B (n · part, r · k) for the n parts enabled, none for a
        rank of 0; warn if r is above `limit`."""
        check_numbers(r, lora_alpha, lora_dropout)
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = scaling(r, lora_alpha, use_rslora)
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self.merge_weights, self.part, n = merge_weights, part, sum(self.enable_lora)
        if r * n == 0:
            return
        if r > limit:
            warnings.warn(f"r={r} is above {limit}, the most that saves anything", stacklevel=3)
        self.lora_A = nn.Parameter(self.weight.new_empty(n * r * k, inputs))
        self.lora_B = nn.Parameter(self.weight.new_empty(n * part, r * k))
        self.weight.requires_grad = False
        self._reset_adapter()
        self._kind.add_tensors(self)
        for name in self.frozen_names:
            getattr(self, name).requires_grad = False

    def _reset_adapter(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def reset_parameters(self) -> None:
        """Unmerge, draw W0 and the bias as torch does, start the adapter afresh."""
        self.unmerge()
        super().reset_parameters()  # type: ignore[misc]  # that of the torch layer beside this one
        if self.adapted:
            self._reset_adapter()

    @torch.no_grad()
    def start_from_base(self) -> None:
        """Set what the layer's kind takes from W0."""
        if self.adapted and not self.base_weight.is_meta:
            self._kind.start_from_base(self)

    @property
    def _kind(self) -> Lora:
        return KINDS[self.kind]

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter: r > 0 and, in MergedLinear, a part enabled."""
        return hasattr(self, "lora_A")

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """Names of the adapter's tensors that are kept with it and not trained."""
        return self._kind.frozen

    def adapter_tensors(self) -> tuple[Tensor, ...]:
        """A, B and what the kind adds to them; nothing without an adapter."""
        names = ("lora_A", "lora_B", *self._kind.extra) if self.adapted else ()
        return tuple(getattr(self, name) for name in names)

    def parts(self, a: Tensor, b: Tensor, dim: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number, A_i and B_i of each part enabled; with dim -1 `a` is A x, and split likewise."""
        numbers = (i for i, enabled in enumerate(self.enable_lora) if enabled)
        return zip(numbers, a.split(b.size(1), dim), b.split(self.part), strict=True)

    def factors(self) -> list[tuple[int, Tensor, Tensor]]:
        """Number, A' (k, in) and B' (part, k) of each part adapted, scaling · B'A' its update."""
        return list(self._kind.factors(self))

    @property
    def base_weight(self) -> Tensor:
        """W0, whatever `weight` shows."""
        base = self._parameters["weight"] if self.merged else self.weight
        assert base is not None
        return base

    def serving_weight(self) -> tuple[Tensor, bool]:
        """The weight of this forward pass, and whether it is all that the output needs: W0 + delta
        where that is merged and no gradient can be asked for, or W0 without an adapter."""
        if self.merged and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if self._merged_from is None or self._merged_from[0] != self._fingerprint():
                self.merge()
            return self.weight, True
        return self.base_weight, not self.adapted

    def adapt(self, h: Tensor, x: Tensor) -> Tensor:
        """The output for x, given that of the frozen layer, h."""
        return self._kind.forward(self, h, x)

    def add_update(self, h: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """h + scaling · B(A(x))"""
        raise NotImplementedError

    def delta_weight(self, a: Tensor, b: Tensor) -> Tensor:
        """scaling · BA in the shape of W0."""
        raise NotImplementedError

    def update_norm(self) -> float:
        """The Frobenius norm of what merging adds to W0; no tensor of W0's size is made."""
        with torch.no_grad():
            return self._kind.update_norm(self) if self.adapted else 0.0

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W0 + delta, summed in fp32 or wider and rounded once to the dtype of W0."""
        base, *adapter = self._sources()
        if not adapter:
            return base.detach()
        wide = torch.promote_types(base.dtype, torch.float32)
        with torch.autocast(base.device.type, enabled=False):
            a, b, *extra = (tensor.to(wide) for tensor in adapter)
            return self._kind.merged_weight(self, base.to(wide), a, b, *extra).to(base.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Show W0 + delta as `weight`, made anew at each call."""
        if not self.adapted:
            return
        sources = self._sources()
        self.merged = True
        if any(tensor.is_meta for tensor in sources):
            return  # nothing to add yet; the first forward after loading merges
        self.__dict__["weight"] = self.merged_weight()
        self._merged_from = self._fingerprint(), sources  # held, or another could get their ids

    def unmerge(self) -> None:
        """Show W0 as `weight` again, bit for bit: nothing was ever written to it."""
        if self.merged:
            self.__dict__.pop("weight", None)
            self.merged, self._merged_from = False, None

    def _sources(self) -> tuple[Tensor, ...]:
        return self.base_weight, *self.adapter_tensors()

    def _fingerprint(self) -> tuple:
        versions = ((id(t), 0 if t.is_inference() else t._version) for t in self._sources())
        return self.scaling, *versions

    def train(self, mode: bool = True) -> Self:
        """Unmerge for training; merge for evaluation if `merge_weights`."""
        super().train(mode)
        if mode:
            self.unmerge()
        elif self.merge_weights:
            self.merge()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # .to(), .half(), .cuda() …
        if self.merged:
            self.merge()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.merged:
            self.merge()

    def _save_to_state_dict(self, *args: Any) -> None:
        if self.merged:
            warnings.warn(STATE_DICT_WARNING, stacklevel=2)
        super()._save_to_state_dict(*args)


class Linear(LoRALayer, nn.Linear):
    """nn.Linear and an adapter: (..., in) → (..., out)."""

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
            self.weight = nn.Parameter(self.weight.detach().view(in_features, out_features))
        part = out_features // len(self.enable_lora)
        sizes = {"inputs": in_features, "part": part, "limit": min(in_features, part)}
        self._add_adapter(r, lora_alpha, lora_dropout, merge_weights, use_rslora, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        """W0 x + bias + scaling · B A dropout(x)"""
        weight, complete = self.serving_weight()
        h = F.linear(x, weight.T if self.fan_in_fan_out else weight, self.bias)  # W0 x + bias
        return h if complete else self.adapt(h, x)  # + scaling · B A dropout(x), by its kind

    def add_update(self, h: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return h + _up(self.scaling * F.linear(x.to(a.dtype), a), b).to(h.dtype)

    def delta_weight(self, a: Tensor, b: Tensor) -> Tensor:
        delta = self.scaling * (b @ a)
        return delta.T if self.fan_in_fan_out else delta

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.fan_in_fan_out:  # nn.Linear has taken the wrong side for the fan-in
            bound = self.in_features**-0.5
            for parameter in (self.weight,) if self.bias is None else (self.weight, self.bias):
                nn.init.uniform_(parameter, -bound, bound)
        self.start_from_base()


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

    def add_update(self, h: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """h, and in the columns of each part enabled + scaling · B_i(A_i(x))"""
        parts = list(h.split(self.part, dim=-1))
        down = self.scaling * F.linear(x.to(a.dtype), a)  # (..., r · enabled)
        for i, down_i, b_i in self.parts(down, b, dim=-1):
            parts[i] = parts[i] + _up(down_i, b_i).to(h.dtype)
        return torch.cat(parts, dim=-1)

    def delta_weight(self, a: Tensor, b: Tensor) -> Tensor:
        parts = list(a.new_zeros(self.out_features, self.in_features).split(self.part))
        for i, a_i, b_i in self.parts(a, b):
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
        limit = min(num_embeddings, embedding_dim)
        sizes = {"inputs": num_embeddings, "part": embedding_dim, "limit": limit}
        self._add_adapter(r, lora_alpha, 0.0, merge_weights, use_rslora, **sizes)

    def _reset_adapter(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Row t of W0 + scaling · B A[:, t], for each id t of x."""
        weight, complete = self.serving_weight()
        options = self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        h = F.embedding(x, weight, self.padding_idx, *options)
        return h if complete else self.adapt(h, x)

    def add_update(self, h: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        by_frequency = self.scale_grad_by_freq
        rows = F.embedding(x, a.T, self.padding_idx, scale_grad_by_freq=by_frequency)
        return h + _up(self.scaling * rows, b).to(h.dtype)

    def delta_weight(self, a: Tensor, b: Tensor) -> Tensor:
        return self.scaling * (b @ a).T


def _up(h: Tensor, b: Tensor) -> Tensor:
    """B h: (..., r) → (..., out). The copy of B makes backward on a CPU several times faster."""
    return h @ b.T.contiguous()
