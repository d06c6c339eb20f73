"""PEFT's adapters of GPT-2 as adapters of this repository, and back.

PEFT adapts the fused projection c_attn as a whole. Where each rank-one term of such an adapter
reaches only one of query, key and value, it is read as adapters of these; otherwise it is kept
whole, target `c_attn`. Both are the same function as in PEFT.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

import loralib as lora
from checkpoints.header import AdapterHeader, Base
from common.errors import InputError
from loralib import LoraConfig
from loralib.peft import (
    Pair,
    common_rank_and_scaling,
    from_peft,
    padded,
    split_parts,
    start_from_base,
    to_peft,
)
from model import LORA_TARGETS, GPT2LMModel

PARTS = "qkv"


def read(
    config: Mapping,
    tensors: Mapping[str, Tensor],
    own_header: AdapterHeader | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Return header and tensors, as of a file of this repository, for a PEFT adapter of GPT-2.

    The header has no model card and, unless the file was exported here (`own_header`, for which
    the tensors still must speak), no fingerprint of the base. `base` has the base's tensors, which
    an adapter that started from them (PiSSA, OLoRA) cannot be read without.

    Raises:
        InputError: the adapter has a setting or a tensor that GPT-2 here has no place for.
    """
    try:
        pairs, biases = from_peft(config, tensors)
        start = start_from_base(config)
        modules = {name: _module(name) for name in pairs}
        _check_widths(pairs, modules)
        starts = {}
        if start is not None:
            starts = {name: _start_pair(start, name, pairs[name], base) for name in pairs}
        owners = []
        if own_header is not None and (own := own_header.lora):
            owners = [PARTS.index(t) for t in own.targets if t in PARTS for _ in range(own.r)]
        targets, layers = _by_target(pairs, modules, owners, whole=start is not None)
    except ValueError as error:
        raise InputError(f"this PEFT adapter cannot be read: {error}") from error
    r, scaling = common_rank_and_scaling([p for own in layers.values() for p in own.values()])
    name = config.get("base_model_name_or_path")
    header = AdapterHeader(
        lora=_lora_config(config, targets, r, scaling, start),
        base=Base(name if isinstance(name, str) else None),
    )
    if own_header is not None and _agree(own_header.lora, header.lora):
        header = own_header
    found = _tensors(layers, targets, r, scaling) | biases
    for name, pair in starts.items():
        a, b = padded(pair.a, pair.b * (pair.scaling / scaling), r)
        found |= {f"{name}.lora_A0": a, f"{name}.lora_B0": b}
    return header, found


def _start_pair(start: str, name: str, pair: Pair, base: Mapping[str, Tensor] | None) -> Pair:
    """The product that PEFT took from W0 when the adapter began, as a pair of its rank.

    W0 is (in, out). PiSSA's product is the first r singular directions of W0. OLoRA's is Q R of
    W0 as it is stored, cut to r columns and rows.
    """
    if pair.magnitude is not None:
        raise ValueError(f"use_dora and init_lora_weights {start!r} together cannot be read")
    if base is None:
        raise ValueError(f"init_lora_weights {start!r} changed the base, which is needed, too")
    weight, r = base.get(f"{name}.weight"), len(pair.a)
    if weight is None or weight.shape != (pair.a.size(1), len(pair.b)):
        shape = "no such layer" if weight is None else list(weight.shape)
        raise ValueError(f"layer {name} does not fit the base, which has {shape}")
    weight = weight.float()
    if start == "olora":
        q, rest = torch.linalg.qr(weight)
        return Pair(q[:, :r].T, rest[:r].T, pair.scaling)
    u, values, v = torch.linalg.svd(weight.T, full_matrices=False)
    root = (values[:r] / pair.scaling).sqrt()
    return Pair(root[:, None] * v[:r], u[:, :r] * root, pair.scaling)


def _check_widths(pairs: Mapping[str, Pair], modules: Mapping[str, str]) -> None:
    """Raise ValueError unless layers of one kind are of one shape: they will have one rank."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, pair in pairs.items():
        own = pair.a.size(1), len(pair.b)
        if shapes.setdefault(modules[name], own) != own:
            raise ValueError(f"layer {name} is of {own} and others of {shapes[modules[name]]}")


def _lora_config(
    config: Mapping, targets: list[str], r: int, scaling: float, start: str | None
) -> LoraConfig:
    """The settings of the adapter at one rank and scaling; raises InputError. Whatever product was
    taken from the base at the start, PiSSA is the kind that has one."""
    rslora = bool(config.get("use_rslora"))
    alpha, dropout = scaling * (math.sqrt(r) if rslora else r), config.get("lora_dropout", 0.0)
    kind = "pissa" if start else "dora" if config.get("use_dora") else "lora"
    try:
        return LoraConfig(r, alpha, dropout, tuple(targets), kind, rslora)
    except ValueError as error:
        raise InputError(f"this PEFT adapter cannot be read: {error}") from error


def _agree(own: LoraConfig | None, found: LoraConfig | None) -> bool:
    """Whether settings of our own header say what the tensors of the folder are."""
    if own is None or found is None:
        return False
    same = (own.targets, own.r) == (found.targets, found.r)
    return same and math.isclose(own.scaling, found.scaling)


def _module(name: str) -> str:
    module = re.sub(r"^transformer\.(h\.\d+\.)?", "", name)
    if module not in LORA_TARGETS.values():
        raise ValueError(f"it adapts {name}, for which GPT-2 here has no adapter")
    return module


def _by_target(
    pairs: Mapping[str, Pair], modules: Mapping[str, str], owners: list[int], whole: bool
) -> tuple[list[str], dict[str, dict[str, Pair]]]:
    """Targets in their order, and for each layer its pairs by target; query, key and value apart
    where that can be, unless they are to be kept whole."""
    parts = {}
    for name, pair in pairs.items():
        if modules[name] == LORA_TARGETS["c_attn"] and not whole:
            parts[name] = split_parts(pair, len(PARTS), owners)
    whole = whole or any(split is None for split in parts.values())
    layers: dict[str, dict[str, Pair]] = {}
    for name, pair in pairs.items():
        if name not in parts or whole:
            (target,) = (
                t
                for t, module in LORA_TARGETS.items()
                if module == modules[name] and t not in PARTS
            )
            layers[name] = {target: pair}
            continue
        lengths = [None] * 3 if pair.magnitude is None else pair.magnitude.chunk(len(PARTS))
        splits = parts[name] or []  # never None here: `pair` would have been kept whole
        layers[name] = {
            part: Pair(*split, pair.scaling, length)
            for part, split, length in zip(PARTS, splits, lengths, strict=True)
            if split is not None
        }
    present = {target for own in layers.values() for target in own}
    return [target for target in LORA_TARGETS if target in present], layers


def _tensors(
    layers: Mapping[str, Mapping[str, Pair]], targets: list[str], r: int, scaling: float
) -> dict[str, Tensor]:
    """All pairs at one rank and one scaling; layers that PEFT left out get B = 0."""
    tensors = {}
    for name, own in layers.items():
        wanted = [t for t in targets if LORA_TARGETS[t] == LORA_TARGETS[next(iter(own))]]
        some = next(iter(own.values()))
        empty = Pair(some.a.new_zeros(0, some.a.size(1)), some.b.new_zeros(len(some.b), 0), scaling)
        pairs = [own.get(target, empty) for target in wanted]
        ab = [padded(p.a, p.b * (p.scaling / scaling), r) for p in pairs]
        tensors[f"{name}.lora_A"] = torch.cat([a for a, _ in ab])
        tensors[f"{name}.lora_B"] = torch.cat([b for _, b in ab])
        if some.magnitude is not None:
            magnitudes = [pair.magnitude for pair in pairs if pair.magnitude is not None]
            if len(magnitudes) < len(pairs):
                raise InputError(f"this PEFT adapter cannot be read: {name} lacks magnitudes")
            tensors[f"{name}.lora_magnitude"] = torch.cat(magnitudes)
    return tensors


def fill_blocks(tensors: Mapping[str, Tensor], model: GPT2LMModel) -> dict[str, Tensor]:
    """The tensors, with pairs that add nothing for blocks that a PEFT adapter leaves as they are;
    `model` has its base loaded, and anything for an adapter."""
    own = lora.lora_state_dict(model)
    for tensor in own.values():
        tensor.zero_()
    lora.start_from_base(model)
    left_out = {name: t for name, t in own.items() if name not in tensors}
    if left_out:
        layers = {name.rpartition(".")[0] for name in left_out}
        print(f"The PEFT adapter leaves {len(layers)} layers as they are, first {min(layers)}")
    return dict(tensors) | {
        name: t if name.endswith("lora_magnitude") else torch.zeros_like(t)
        for name, t in left_out.items()
    }


def write(
    model: GPT2LMModel, header: AdapterHeader, biases: bool, base_name: str
) -> tuple[dict, dict[str, Tensor], dict[str, str]]:
    """Configuration, tensors and file metadata of the PEFT folder for the adapter in `model`, whose
    base PEFT finds as `base_name`."""
    bias = "none"
    if biases:
        bias = (header.settings or {}).get("train_bias", "all")
    config, tensors = to_peft(model, bias)
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_name}
    if header.lora and header.kind == "pissa":  # which PEFT holds as LoRA of twice the rank
        r, alpha = 2 * header.lora.r, 2 * header.lora.r * header.lora.scaling
        header = replace(
            header, lora=replace(header.lora, r=r, alpha=alpha, kind="lora", rslora=False)
        )
    return config, tensors, {"format": "pt", "adapter": header.to_json()}
