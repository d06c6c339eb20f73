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

from .config import scaling
from .kinds import rows_by_part
from .layers import Embedding, Linear, LoRALayer
from .utils import lora_state_dict

PREFIX = "base_model.model."
# What `from_peft` reads of a configuration. Of the rest, these say nothing about what a trained
# adapter computes, as the tensors say it or it is for training alone; any other is refused if set.
READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_dora", "init_lora_weights",
}  # fmt: skip
WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "fan_in_fan_out", "bias",
    "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
}  # fmt: skip
# Initialisations: those that leave W0 as it is, and those whose start product is taken from W0,
# which is not in the file but follows from W0. All others change W0 in a way that is lost.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "mica")
STARTS_FROM_BASE = ("pissa", "olora")
LARGEST_RANK, LARGEST_ALPHA = 2**16, 1e9


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
    """Return pairs by layer, and trained biases by name, of a PEFT adapter.

    A pair is relative to the base that PEFT had after its initialisation: where `start_from_base`
    says so, that is another than the base that PEFT was given.

    Raises:
        ValueError: it is no LoRA, has a setting without counterpart or of another type, or tensors
            that are unknown or do not fit together; the message names the setting or tensor.
    """
    check_config(config)
    found: dict[str, dict[str, Tensor]] = {}
    biases = {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"tensor {key} holds {tensor.dtype}, not weights")
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
    if not found:
        raise ValueError("there are no LoRA tensors")
    return {name: _pair(config, name, own) for name, own in found.items()}, biases


def start_from_base(config: Mapping[str, Any]) -> str | None:
    """Return the initialisation that took its start product from W0, one of STARTS_FROM_BASE."""
    start = config.get("init_lora_weights", True)
    start = start.lower() if isinstance(start, str) else start
    return start if start in STARTS_FROM_BASE else None


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that cannot be honoured, or is of another type."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')!r:.40}; only LORA can be read")
    for key, value in config.items():
        if value and key not in READ | WITHOUT_EFFECT:
            raise ValueError(f"{key:.60} is set, which has no counterpart here")
    start = config.get("init_lora_weights", True)
    plain = start is None or (isinstance(start, bool | str) and start in PLAIN_STARTS)
    if not plain and start_from_base(config) is None:
        raise ValueError(
            f"init_lora_weights is {start!r:.40}: its change of the base is not in the file and "
            "cannot be made again"
        )
    _check_values(config)


def _check_values(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a switch, alpha or rank of another type or out of its bounds."""
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key, False), bool | None):
            raise ValueError(f"{key} is {config[key]!r:.40}, not true or false")
    alphas, ranks = _pattern(config, "alpha_pattern"), _pattern(config, "rank_pattern")
    for key, value in {"lora_alpha": config.get("lora_alpha"), **alphas}.items():
        if not _is_number(value) or not 0 < value <= LARGEST_ALPHA:
            raise ValueError(f"{key:.60} is {value!r:.40}, not above 0 and at most 1e9")
    for key, value in {"r": config.get("r"), **ranks}.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST_RANK:
            raise ValueError(f"{key:.60} is {value!r:.40}, not a rank from 1 to {LARGEST_RANK}")


def _pattern(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, Mapping):
        raise ValueError(f"{key} is {pattern!r:.40}, not an object of values by layer")
    return pattern


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pair(config: Mapping[str, Any], name: str, own: Mapping[str, Tensor]) -> Pair:
    """The pair of one layer, its tensors compared with each other and with the configuration."""
    if not {"A", "B"} <= own.keys():
        raise ValueError(f"layer {name} has only one of lora_A and lora_B")
    a, b, magnitude = own["A"], own["B"], own.get("magnitude_vector")
    shapes = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
    if a.dim() != 2 or b.dim() != 2 or len(a) != b.size(1) or 0 in (*a.shape, *b.shape):
        raise ValueError(f"layer {name}: {shapes} do not fit")
    r = len(a)
    if r not in (config["r"], *_pattern(config, "rank_pattern").values()):
        raise ValueError(f"layer {name}: {shapes} have another rank than r and rank_pattern")
    if (magnitude is not None) != bool(config.get("use_dora")):
        raise ValueError(f"layer {name} has no magnitudes" if magnitude is None else
                         f"layer {name} has magnitudes, but use_dora is not set")  # fmt: skip
    if magnitude is not None:
        if magnitude.numel() != len(b):
            raise ValueError(f"layer {name}: magnitudes {list(magnitude.shape)}, {shapes}")
        magnitude = magnitude.reshape(-1)
    patterns = _pattern(config, "alpha_pattern")
    alpha = next((patterns[key] for key in patterns if _names(key, name)), config["lora_alpha"])
    return Pair(a, b, scaling(r, alpha, bool(config.get("use_rslora"))), magnitude)


def _names(pattern: str, layer: str) -> bool:
    """Whether PEFT takes a key of a pattern for the name of a layer: the whole of it, or its end
    after a dot. A dot in a key stands for any character, as PEFT reads keys as regular expressions.

    Raises:
        ValueError: the key is a regular expression beyond that, which could take for ever.
    """
    match = re.fullmatch(r"(\^?)((?:[\w-]|\\?\.)+)\$?", pattern)
    if not match:
        raise ValueError(
            f"alpha_pattern {pattern!r:.60} is a regular expression; only names of layers are read"
        )
    letters = re.findall(r"\\\.|.", match[2])
    end = layer[-len(letters) :]
    before = layer[: -len(letters)]
    fits = len(end) == len(letters) and all(
        letter == "." or letter[-1] == own for letter, own in zip(letters, end, strict=True)
    )
    return fits and (not before or (not match[1] and before.endswith(".")))


def split_parts(
    pair: Pair, parts: int, owners: Sequence[int] = ()
) -> list[tuple[Tensor, Tensor] | None] | None:
    """For each of `parts` equal parts of the output its own A_i (r_i, in) and B_i, or None for a
    part that nothing is added to; None for all if some column of B reaches another part than its
    owner, where `owners` names one for each column, or does not reach exactly one part."""
    if len(pair.b) % parts:
        raise ValueError(f"lora_B {list(pair.b.shape)} is not {parts} parts of one size")
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
