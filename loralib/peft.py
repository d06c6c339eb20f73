"""Adapters of PEFT (the Hugging Face library) and back: configuration and tensors, as dicts.

PEFT adapts a layer as a whole; it has no MergedLinear. But the adapters of n parts, each of rank r,
are one adapter of rank n·r whose A stacks theirs and whose B holds theirs as blocks, with zeros
elsewhere: the same function. `to_peft` writes that, `split_parts` finds the blocks again.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kinds import rows_by_part
from .layers import Embedding, Linear, LoRALayer
from .utils import lora_state_dict

PREFIX = "base_model.model."
# Settings of PEFT that change what an adapter computes and have no counterpart here.
FOREIGN = (
    "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters",
    "lora_bias", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip


class Pair(NamedTuple):
    """One layer's adapter: W0 + scaling · BA, A (r, in), B (out, r); with a magnitude, (out,), each
    row brought to that length (DoRA)."""

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None


def to_peft(model: nn.Module, bias: str = "none") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's `adapter_config.json` and `adapter_model.safetensors` for the adapters in `model`.

    All kinds of Linear and MergedLinear, and Embedding; DoRA needs the base loaded in the model.
    `bias` as in `lora_state_dict`. ValueError for an adapted layer of another type.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALayer) and layer.adapted
    }
    if not layers:
        raise ValueError("the model has no adapter")
    pairs = {name: whole_pair(layer) for name, layer in layers.items()}
    config = _config(model, layers, pairs) | {"bias": bias}
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        if isinstance(layers[name], Embedding):
            own = {"lora_embedding_A": pair.a, "lora_embedding_B": pair.b}
        else:
            own = {"lora_A.weight": pair.a, "lora_B.weight": pair.b}
        if pair.magnitude is not None:
            own["lora_magnitude_vector"] = pair.magnitude
        tensors |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in own.items()}
    for name, tensor in lora_state_dict(model, bias).items():
        owner, _, own_name = name.rpartition(".")
        if not own_name.startswith("lora_"):
            inner = ".base_layer" if owner in layers else ""
            tensors[f"{PREFIX}{owner}{inner}.{own_name}"] = tensor
    return config, tensors


@torch.no_grad()
def whole_pair(layer: LoRALayer) -> Pair:
    """The one pair over the whole output that does what the layer's adapter does."""
    if isinstance(layer, Embedding):
        return Pair(layer.lora_A, layer.lora_B, layer.scaling)
    if not isinstance(layer, Linear):
        raise ValueError(f"PEFT's form of a {type(layer).__name__} adapter is another one")
    blocks = list(layer.factors())
    columns = [b.size(1) for _, _, b in blocks]
    whole = layer.lora_B.new_zeros(layer.out_features, sum(columns))
    for (i, _, b), own in zip(blocks, whole.split(columns, dim=1), strict=True):
        own[i * layer.part : (i + 1) * layer.part] = b
    magnitude = None
    if layer.kind == "dora":
        lengths = [rows.norm(dim=1) for rows in rows_by_part(layer, layer.base_weight)]
        _, _, trained = layer.adapter_tensors()
        for (i, _, _), length in zip(blocks, trained.split(layer.part), strict=True):
            lengths[i] = length
        magnitude = torch.cat(lengths)
    return Pair(torch.cat([a for _, a, _ in blocks]), whole, layer.scaling, magnitude)


def _config(
    model: nn.Module, layers: Mapping[str, LoRALayer], pairs: Mapping[str, Pair]
) -> dict[str, Any]:
    first = next(iter(layers.values()))
    ranks = {name: len(pair.a) for name, pair in pairs.items()}
    uniform = len({(ranks[name], layers[name].scaling) for name in layers}) == 1
    rslora = first.use_rslora and uniform  # PEFT has no rank patterns beside it
    alphas = {
        name: layer.scaling * (math.sqrt(ranks[name]) if rslora else ranks[name])
        for name, layer in layers.items()
    }
    r, alpha = max(ranks.values()), max(alphas.values())
    targets = _short_names(model, layers)
    dropout = first.lora_dropout.p if isinstance(first.lora_dropout, nn.Dropout) else 0.0
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(set(targets.values())),
        "rank_pattern": {targets[n]: rank for n, rank in ranks.items() if rank != r},
        "alpha_pattern": {targets[n]: value for n, value in alphas.items() if value != alpha},
        "fan_in_fan_out": any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        "use_rslora": rslora,
        "use_dora": first.kind == "dora",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _short_names(model: nn.Module, layers: Mapping[str, LoRALayer]) -> dict[str, str]:
    """Name → what follows the last number in it, where that picks these layers and no others."""
    short = {name: re.sub(r".*\.\d+\.", "", name) for name in layers}
    ends = tuple(f".{end}" for end in short.values())
    picked = {name for name, _ in model.named_modules() if f".{name}".endswith(ends)}
    return short if picked == set(layers) else {name: name for name in layers}


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Pairs by layer, and trained biases by name, of a PEFT adapter.

    ValueError for what is no LoRA, for settings without counterpart, and for unknown tensors.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')!r}; only LORA can be read")
    if foreign := [key for key in FOREIGN if config.get(key)]:
        raise ValueError(f"{foreign[0]} is set, which has no counterpart here")
    found: dict[str, dict[str, Tensor]] = {}
    biases = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(
            r"(.*)\.lora_(?:embedding_)?(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?", name
        )
        if match:
            found.setdefault(match[1], {})[match[2]] = tensor
        elif name.endswith(".bias"):
            biases[name.replace(".base_layer.", ".")] = tensor
        else:
            raise ValueError(f"tensor {key} is neither part of a LoRA pair nor a bias")
    if incomplete := [name for name, own in found.items() if not {"A", "B"} <= own.keys()]:
        raise ValueError(f"layer {incomplete[0]} has only one of lora_A and lora_B")
    pairs = {
        name: Pair(own["A"], own["B"], _scaling(config, name, own), own.get("magnitude_vector"))
        for name, own in found.items()
    }
    return pairs, biases


def _scaling(config: Mapping[str, Any], name: str, own: Mapping[str, Tensor]) -> float:
    r = len(own["A"])
    if own["B"].dim() != 2 or own["B"].size(1) != r:
        raise ValueError(f"layer {name}: lora_A {list(own['A'].shape)} and lora_B do not fit")
    patterns = config.get("alpha_pattern") or {}
    matching = [key for key in patterns if re.match(rf"(.*\.)?({key})$", name)]
    alpha = patterns[matching[0]] if matching else config["lora_alpha"]
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def split_parts(
    pair: Pair, parts: int, owners: Sequence[int] = ()
) -> list[tuple[Tensor, Tensor] | None] | None:
    """For each of `parts` equal parts of the output its own A_i (r_i, in) and B_i, or None for a
    part that nothing is added to; None for all if some column of B reaches another part than its
    owner, where `owners` names one for each column, or does not reach exactly one part."""
    blocks = pair.b.view(parts, -1, pair.b.size(1))
    reached = blocks.ne(0).any(dim=1)  # (parts, r)
    if len(owners) == pair.b.size(1):
        owned = torch.arange(parts)[:, None] == torch.tensor(owners)
        if bool((reached & ~owned).any()):
            return None
        reached = owned
    elif bool((reached.sum(dim=0) != 1).any()):
        return None
    return [
        (pair.a[own], block[:, own]) if bool(own.any()) else None
        for own, block in zip(reached, blocks, strict=True)
    ]


def padded(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The same update at rank `r`, which is at least that of A (r', in) and B (out, r')."""
    more = r - len(a)
    zeros = a.new_zeros(more, a.size(1)), b.new_zeros(b.size(0), more)
    return torch.cat((a, zeros[0])), torch.cat((b, zeros[1]), dim=1)


def common_rank_and_scaling(pairs: Sequence[Pair]) -> tuple[int, float]:
    """The largest rank, and the scaling that most of the pairs have."""
    scalings = [pair.scaling for pair in pairs]
    return max(len(pair.a) for pair in pairs), max(scalings, key=scalings.count)
