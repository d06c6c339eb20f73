"""Several adapters of one base: one for each row of a batch, or a weighted sum of some."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layers import LoRALayer


@contextmanager
def adapters_by_row(
    model: nn.Module, adapted: Mapping[str, nn.Module], names: Sequence[str | None]
) -> Iterator[nn.Module]:
    """Within the block, row i of what goes through `model` has the adapter `names[i]`, or none.

    An adapter is what has `adapt(h, x)`: the layers here, and other modules of a model that have it
    where the base has one without parameters.

    The base is computed once for all rows, each adapter thinly for its own (as in S-LoRA; Sheng et
    al. 2023, arXiv:2311.03285); nothing is merged.

    Args:
        model: the base, without adapters; inputs have len(names) rows, and layers may see several
            positions of a row one after the other.
        adapted: by name, models of the same structure with an adapter, on equal base weights.

    Raises:
        ValueError: a name is unknown, or a model differs from the base in more than such adapters.
    """
    if unknown := {name for name in names if name is not None} - adapted.keys():
        raise ValueError(f"no adapter is called {min(unknown)!r}; there are {', '.join(adapted)}")
    with ExitStack() as hooks:
        for name, other in adapted.items():
            _check_same_base(name, model, other)
            rows = torch.tensor([row == name for row in names])
            for path, twin in other.named_modules():
                if _is_adapter(twin) and rows.any():
                    layer = model.get_submodule(path)
                    hooks.callback(layer.register_forward_hook(_adding(twin, rows)).remove)
        yield model


def _is_adapter(module: nn.Module) -> bool:
    return module.adapted if isinstance(module, LoRALayer) else hasattr(module, "adapt")


def _adding(twin: Any, rows: Tensor) -> Callable[..., Tensor]:
    """A forward hook by which `twin` completes a layer's output in the marked `rows`, (B,)."""

    def hook(layer: nn.Module, inputs: tuple[Tensor], h: Tensor) -> Tensor:
        (x,) = inputs
        if len(x) % len(rows):
            raise ValueError(f"{len(x)} inputs are not {len(rows)} rows of equal length")
        mine = rows.to(x.device).repeat_interleave(len(x) // len(rows))
        return h.index_put((mine,), twin.adapt(h[mine], x[mine]))

    return hook


def _check_same_base(name: str, model: nn.Module, other: nn.Module) -> None:
    theirs = dict(other.named_parameters())
    for key, tensor in model.named_parameters():
        own = theirs.get(key)
        if own is None or (own.data_ptr() != tensor.data_ptr() and not torch.equal(own, tensor)):
            raise ValueError(f"adapter {name!r} has another {key} than the base")
    for path, twin in other.named_modules():
        if _is_adapter(twin):
            theirs = {key: t for key, t in theirs.items() if not key.startswith(f"{path}.")}
    if extra := theirs.keys() - dict(model.named_parameters()):
        raise ValueError(f"adapter {name!r} has {min(extra)}, which no row can have to itself")


def merge_adapters(
    adapters: Sequence[Mapping[str, Tensor]], scalings: Sequence[float], weights: Sequence[float]
) -> dict[str, Tensor]:
    """One adapter whose update is Σ weight · scaling · BA of several, exactly.

    Its rank is the sum of theirs, and it has scaling 1: `lora_alpha` equal to that rank.

    Args:
        adapters: what `lora_state_dict` gives, of plain LoRA layers of the same names.
        scalings: lora_alpha / r of each, or lora_alpha / √r.

    Raises:
        ValueError: the counts or the names differ, or a tensor is no plain lora_A or lora_B.
    """
    if not len(adapters) == len(scalings) == len(weights) > 0:
        counts = len(adapters), len(scalings), len(weights)
        raise ValueError(f"need as many adapters as scalings and weights, got {counts}")
    names = adapters[0].keys()
    for adapter in adapters:
        if adapter.keys() != names:
            raise ValueError(f"adapters differ in {min(adapter.keys() ^ names)}")
    merged = {}
    for name in names:
        owner, _, own = name.rpartition("lora_")
        if own not in ("A", "B"):
            raise ValueError(f"{name} is no lora_A or lora_B; only these can be added")
        if own == "B":
            continue
        pairs = [(adapter[name], adapter[f"{owner}lora_B"]) for adapter in adapters]
        parts = {len(a) // b.size(1) for a, b in pairs}  # of a MergedLinear; 1 for the others
        if len(parts) != 1:
            raise ValueError(f"adapters differ in the parts that {owner}lora_A adapts")
        n = parts.pop()
        factors = [scaling * weight for scaling, weight in zip(scalings, weights, strict=True)]
        stacks = zip(*(a.chunk(n) for a, _ in pairs), strict=True)
        merged[name] = torch.cat([a for stack in stacks for a in stack])
        columns = [factor * b for factor, (_, b) in zip(factors, pairs, strict=True)]
        merged[f"{owner}lora_B"] = torch.cat(columns, dim=1)
    return merged
