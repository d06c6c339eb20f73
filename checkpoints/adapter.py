"""Adapter files: written whole or not at all, and read from every format in use.

An adapter file is `.safetensors` with exactly the trained tensors, and one metadata entry,
`adapter`: JSON that says what they are and which base they belong to. Nothing is unpickled.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from checkpoints import peft as peft_adapter
from checkpoints.base import (
    base_fingerprint,
    canonical_names,
    card_of,
    fingerprint,
    load_base,
    model_config,
    read_base,
    read_safetensors,
    read_tensors,
)
from checkpoints.header import AdapterHeader
from common.errors import InputError
from common.files import replacing
from loralib import LoraConfig
from model import ALL_TARGETS, LORA_TARGETS, GPT2LMModel

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], header: AdapterHeader) -> None:
    """Write trained tensors with their header and checksum; equal content gives equal bytes."""
    fields = header.to_fields()
    fields |= {"sha256": _seal(fields, tensors)}
    metadata = {"adapter": json.dumps(fields, sort_keys=True)}  # one entry: several have no order
    state = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    data = safetensors.torch.save(state, metadata)
    with replacing(path, "wb") as file:
        file.write(data)


def read_adapter(path: str | Path) -> tuple[AdapterHeader | None, dict[str, Tensor]]:
    """Header and tensors of an adapter file, of the newest one in a run's work_dir, or of a folder
    that PEFT wrote.

    Original `.pt` adapters have no header: None is returned in its place.
    """
    path = Path(path)
    if (path / PEFT_FILES[0]).is_file():
        return _read_peft(path)
    if path.is_dir():
        path = newest_adapter(path)
    if path.suffix != ".safetensors":
        return None, canonical_names(read_tensors(path))
    if not path.is_file():
        raise InputError(f"--adapter {path} does not exist")
    metadata, tensors = read_safetensors(path)
    header = AdapterHeader.from_json(metadata.get("adapter"), f"--adapter {path}")
    fields = json.loads(metadata["adapter"])
    if fields.pop("sha256", None) != _seal(fields, tensors):
        raise InputError(f"--adapter {path} is damaged: it is not what was saved")
    return header, tensors


def _seal(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over a header's fields and the tensors."""
    content = json.dumps(fields, sort_keys=True) + fingerprint(tensors)
    return hashlib.sha256(content.encode()).hexdigest()


def _read_peft(folder: Path) -> tuple[AdapterHeader, dict[str, Tensor]]:
    config_path, tensors_path = (folder / name for name in PEFT_FILES)
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--adapter {config_path} is no JSON file: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"--adapter {config_path} is not PEFT's configuration of an adapter")
    own_header = None
    if tensors_path.is_file():
        metadata, tensors = read_safetensors(tensors_path)
        if "adapter" in metadata:
            own_header = AdapterHeader.from_json(metadata["adapter"], f"--adapter {tensors_path}")
    else:
        tensors = read_tensors(folder / "adapter_model.bin")
    try:
        return peft_adapter.read(config, tensors, own_header)
    except InputError as error:
        raise InputError(f"--adapter {folder}: {error}") from error


def newest_adapter(work_dir: str | Path) -> Path:
    """The `model.{step}.safetensors` of the highest step in a folder."""
    files = {
        int(match[1]): path
        for path in Path(work_dir).glob("model.*.safetensors")
        if (match := re.fullmatch(r"model\.(\d+)\.safetensors", path.name))
    }
    if not files:
        raise InputError(f"--adapter {work_dir} holds no model.STEP.safetensors")
    return files[max(files)]


def load_for_decoding(
    args: argparse.Namespace, base: Mapping[str, Tensor] | None = None
) -> tuple[GPT2LMModel, AdapterHeader | None]:
    """As `load_with_adapter`, merged, in eval mode."""
    model, header = load_with_adapter(args, base)
    return merge(model), header


def load_with_adapter(
    args: argparse.Namespace, base: Mapping[str, Tensor] | None = None
) -> tuple[GPT2LMModel, AdapterHeader | None]:
    """The model that `--init_checkpoint` and `--adapter` describe, on the CPU, and the
    adapter's header (None without one); `base`, if given, is what the former holds.

    An adapter's own header rules. Where there is none (the original's files), the rank is read off
    the tensors and `--lora_alpha` is needed.

    Raises:
        InputError: the base is missing or is another than the adapter was trained on, a flag
            contradicts the header, or a tensor does not fit.
    """
    if not args.init_checkpoint:
        raise InputError("--init_checkpoint is missing: an adapter means nothing without its base")
    base = read_base(args.init_checkpoint) if base is None else base
    header, tensors = read_adapter(args.adapter) if args.adapter else (None, {})
    if header is None:
        settings = _settings_from_tensors({**base, **tensors}, args)
    else:
        settings = _settings_from_header(header, args)
        known = header.base.fingerprint
        if known not in (None, base_fingerprint(base)) and not args.allow_other_base:
            raise InputError(
                f"--init_checkpoint {args.init_checkpoint} is not the base that the adapter was "
                f"trained on ({header.base.name}); give that one, or --allow_other_base"
            )
    card = (header and header.model_card) or args.model_card or card_of(base)
    model = GPT2LMModel(model_config(card, base, lora=settings))
    load_base(model, base, args.init_checkpoint)
    if header is not None and header.model_card is None:
        tensors = peft_adapter.fill_blocks(tensors, model)
    apply_trained(model, tensors, args.adapter)
    return model, header


def parse_targets(text: str) -> tuple[str, ...]:
    """What `--lora_targets` names, each once and in the order of LORA_TARGETS."""
    named = [part.strip() for part in text.split(",")]
    names = {name for part in named for name in (ALL_TARGETS if part == "all" else (part,))}
    unknown = sorted(names - LORA_TARGETS.keys())
    if unknown:
        choices = ", ".join(LORA_TARGETS)
        raise InputError(f"--lora_targets {unknown[0]!r} is none of {choices} and all")
    return tuple(target for target in LORA_TARGETS if target in names)


def load_adapters(
    args: argparse.Namespace, files: Mapping[str, str | Path]
) -> tuple[GPT2LMModel, dict[str, GPT2LMModel]]:
    """The base of `--init_checkpoint`, and by name a model for each adapter file, all on one copy
    of the base's weights: to call any of them is to switch adapters, to call the base is none."""
    state = read_base(args.init_checkpoint)
    without = argparse.Namespace(**vars(args) | {"adapter": None})
    base = load_with_adapter(without, state)[0].eval()
    models = {}
    for name, path in files.items():
        own = argparse.Namespace(**vars(args) | {"adapter": path})
        models[name] = load_with_adapter(own, state)[0].eval()
        theirs = dict(base.named_parameters())
        for key, parameter in models[name].named_parameters():
            if key in theirs and torch.equal(parameter, theirs[key]):
                parameter.data = theirs[key].data
    return base, models


def _settings_from_header(header: AdapterHeader, args: argparse.Namespace) -> LoraConfig | None:
    trained = {
        "lora_dim": header.lora.r if header.lora else 0,
        "lora_alpha": header.lora and header.lora.alpha,
        "model_card": header.model_card,
    }
    for flag, value in trained.items():
        given = getattr(args, flag)
        if None not in (given, value) and given != value:
            raise InputError(
                f"--{flag} {given} contradicts the adapter, which was trained with {value}; leave "
                "the flag out"
            )
    return header.lora and replace(header.lora, dropout=0.0)


def _settings_from_tensors(
    state: Mapping[str, Tensor], args: argparse.Namespace
) -> LoraConfig | None:
    pairs = {name: t for name, t in state.items() if name.endswith("c_attn.lora_B")}
    if not pairs:
        return None
    if args.lora_alpha is None:
        raise InputError("these files do not say which alpha the adapter has; give --lora_alpha")
    name, b = next(iter(pairs.items()))
    rank, rows = b.size(-1), len(state.get(name.removesuffix("B") + "A", ()))
    targets = {1: ("c_attn",), 2: ("q", "v"), 3: ("q", "k", "v")}.get(rows // rank)
    if targets is None:
        raise InputError(f"tensor {name} of shape {list(b.shape)} does not go with its lora_A")
    if args.lora_dim not in (None, rank):
        raise InputError(f"--lora_dim {args.lora_dim} contradicts the adapter's rank {rank}")
    try:
        return LoraConfig(rank, args.lora_alpha, targets=targets)
    except ValueError as error:
        raise InputError(f"--lora_alpha: {error}") from error


def apply_trained(model: GPT2LMModel, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Put an adapter file's tensors into a model; each must be known and fit.

    Raises:
        InputError: names the file and the tensor; also where some adapter tensors are missing.
    """
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            expected = list(own[name].shape) if name in own else "no such tensor"
            raise InputError(
                f"--adapter {path}: tensor {name} of shape {list(tensor.shape)} does not fit the "
                f"model, which has {expected}"
            )
    missing = [name for name in own if "lora_" in name and name not in tensors]
    if tensors and missing:
        raise InputError(f"--adapter {path} lacks {len(missing)} tensors, first {missing[0]}")
    model.load_state_dict(tensors, strict=False)


def merge(model: GPT2LMModel) -> GPT2LMModel:
    """The model in eval mode with every adapter folded into its layer's weight."""
    for module in model.modules():
        if hasattr(module, "merge_weights"):
            module.merge_weights = True
    return model.eval()
