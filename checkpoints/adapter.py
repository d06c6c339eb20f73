"""Adapter files: written whole or not at all, and read from every format in use.

An adapter file is `.safetensors` with exactly the trained tensors, and one metadata entry,
`adapter`: JSON that says what they are and which base they belong to. Nothing is unpickled.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor

from checkpoints import peft as peft_adapter
from checkpoints import peft_prefix
from checkpoints.base import (
    BaseWeights,
    canonical_names,
    check_base,
    fingerprint,
    model_config,
    read_base,
    read_safetensors,
    read_tensors,
)
from checkpoints.header import AdapterHeader
from common.errors import InputError
from common.files import replacing
from loralib import LoraConfig, LoRALayer
from methods import is_added
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


class FoundAdapter(NamedTuple):
    """The file or PEFT folder that a name of an adapter means, and why that one."""

    path: Path
    reason: str


def find_adapter(name: str | Path) -> FoundAdapter:
    """Return what `--adapter` names: a file, a PEFT folder, or a run's work_dir, which stands for
    the best adapter on validation or, where nothing was validated, for the last. RUN:best, RUN:last
    and RUN:STEP choose one.

    Raises:
        InputError: nothing is there, or the run has not what is asked for.
    """
    path, _, which = str(name).rpartition(":")
    if not (path and re.fullmatch(r"best|last|\d{1,18}", which)) or Path(name).exists():
        path, which = str(name), ""
    folder = Path(path)
    if folder.is_dir() and not (folder / PEFT_FILES[0]).is_file():
        return _adapter_of_run(folder, which)
    if which:
        raise InputError(f"--adapter {name}: {path} is no work_dir of a run, so leave :{which} out")
    if not folder.exists():
        raise InputError(f"--adapter {name} does not exist; give a file, or a run's folder")
    return FoundAdapter(folder, "a PEFT folder" if folder.is_dir() else "the file named")


def _adapter_of_run(run: Path, which: str) -> FoundAdapter:
    best = run / "model.best.safetensors"
    steps = saved_steps(run)
    if which == "best" or (not which and best.is_file()):
        if not best.is_file():
            raise InputError(f"--adapter {run}:best: the run validated nothing; give {run}:last")
        other = f"; {run}:last is the last" if steps and not which else ""
        return FoundAdapter(best, f"the best on validation{other}")
    if not steps:
        raise InputError(f"--adapter {run} holds no model.STEP.safetensors; is it a run's folder?")
    if which.isdigit() and int(which) not in steps:
        raise InputError(
            f"--adapter {run}:{which}: step {which} was not saved; give one of {_listed(steps)}"
        )
    step = int(which) if which.isdigit() else steps[-1]
    reason = f"step {step}" if which.isdigit() else f"the last, step {step}"
    return FoundAdapter(run / f"model.{step}.safetensors", reason)


def saved_steps(run: str | Path) -> list[int]:
    """Return the steps whose adapters a run's work_dir holds, in ascending order."""
    names = (path.name for path in Path(run).glob("model.*.safetensors"))
    found = (re.fullmatch(r"model\.(\d{1,18})\.safetensors", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def _listed(steps: list[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) < 8 else [*shown[:3], "…", *shown[-3:]])


def read_adapter(
    name: str | Path, base: BaseWeights | None = None
) -> tuple[AdapterHeader | None, dict[str, Tensor]]:
    """Return header and tensors of what `find_adapter` finds. Original `.pt` adapters have no
    header: None stands in its place. PEFT's that started from their base cannot be read without
    that `base`."""
    path, _ = find_adapter(name)
    if path.is_dir():
        return _read_peft(path, base)
    if path.suffix != ".safetensors":
        return None, canonical_names(read_tensors(path))
    metadata, tensors = read_safetensors(path)
    header = AdapterHeader.from_json(metadata.get("adapter"), f"--adapter {path}")
    fields = json.loads(metadata["adapter"])
    if fields.pop("sha256", None) != _seal(fields, tensors):
        raise InputError(f"--adapter {path} is damaged: it is not what was saved")
    return header, tensors


def run_paths(adapters: Iterable[FoundAdapter]) -> dict[str, str]:
    """Return base and vocabulary, `init_checkpoint` and `vocab`, of the training run that the first
    adapter of a work_dir comes from, by its run.json; empty where there is none."""
    return next(filter(None, map(_paths_of_run, adapters)), {})


def _paths_of_run(adapter: FoundAdapter) -> dict[str, str]:
    record = (adapter.path if adapter.path.is_dir() else adapter.path.parent) / "run.json"
    try:
        flags = json.loads(record.read_text(encoding="utf-8"))["settings"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise InputError(f"{record} is no record of a run: {error}") from error
    if not isinstance(flags, dict):
        return {}
    known = {name: flags.get(name) for name in ("init_checkpoint", "vocab")}
    return {name: path for name, path in known.items() if isinstance(path, str) and path != "none"}


def _seal(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over a header's fields and the tensors."""
    content = json.dumps(fields, sort_keys=True) + fingerprint(tensors)
    return hashlib.sha256(content.encode()).hexdigest()


def _read_peft(folder: Path, base: BaseWeights | None) -> tuple[AdapterHeader, dict[str, Tensor]]:
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
    kind = config.get("peft_type")
    if kind not in ("LORA", peft_prefix.PEFT_TYPE):
        raise InputError(
            f"--adapter {folder}: peft_type is {kind!r:.40}; only LORA and {peft_prefix.PEFT_TYPE} "
            "can be read"
        )
    try:
        if kind == peft_prefix.PEFT_TYPE:
            return peft_prefix.read(config, tensors, own_header, base)
        return peft_adapter.read(config, tensors, own_header, base.tensors if base else None)
    except InputError as error:
        raise InputError(f"--adapter {folder}: {error}") from error


def load(
    base: str | Path | BaseWeights,
    adapter: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    allow_other_base: bool = False,
    lora_alpha: float | None = None,
    lora_dim: int | None = None,
    model_card: str | None = None,
) -> tuple[GPT2LMModel, AdapterHeader | None]:
    """GPT-2 with an adapter, in eval mode and fp32, and the adapter's header.

    Args:
        base: a file, a model folder, a published name, or what `read_base` made of one.
        adapter: what `find_adapter` finds: an adapter file, a run's work_dir, or a folder that PEFT
            wrote; None for the base alone, which has no header.
        allow_other_base: accept another base than the one that the adapter was trained on.
        lora_alpha: needed where there is no header, as in the original's files, and compared with
            the header where there is one; likewise `lora_dim` and `model_card`, both optional.

    Raises:
        InputError: a file cannot be read, base and adapter do not belong together, a setting
            contradicts the header, or a tensor does not fit.
    """
    base = base if isinstance(base, BaseWeights) else read_base(base)
    header, tensors = read_adapter(adapter, base) if adapter else (None, {})
    model = assemble(
        base, header, tensors, str(adapter), allow_other_base,
        lora_dim=lora_dim, lora_alpha=lora_alpha, model_card=model_card,
    )  # fmt: skip
    return model.to(device), header


def assemble(
    base: BaseWeights,
    header: AdapterHeader | None,
    tensors: Mapping[str, Tensor],
    source: str,
    allow_other_base: bool = False,
    *,
    lora_dim: int | None = None,
    lora_alpha: float | None = None,
    model_card: str | None = None,
) -> GPT2LMModel:
    """As `load`, of what has been read already, on the CPU; `source` is the adapter's path."""
    settings: dict[str, Any]
    if header is None:
        found = _settings_from_tensors({**base.tensors, **tensors}, lora_dim, lora_alpha)
        settings = {"lora": found}
    else:
        settings = _settings_from_header(header, lora_dim, lora_alpha, model_card)
        known = header.base.fingerprint
        if not allow_other_base and known not in (None, base.fingerprint):
            raise InputError(
                f"--init_checkpoint {base.source} is not the base that the adapter was trained on "
                f"({header.base.name}); give that one, or --allow_other_base"
            )
    config = model_config((header and header.model_card) or model_card, base, **settings)
    from_peft = header is not None and header.model_card is None  # it may leave layers out
    whole = header is None and not tensors  # a file of the original with base and adapter
    # Without memory at first: shapes are compared before anything is allocated.
    with torch.device("meta"):
        model = GPT2LMModel(config)
    check_base(model, base)
    check_trained(model, tensors, source, complete=not (from_peft or whole))
    model = model.to_empty(device="cpu")
    model.load_state_dict(base.tensors, strict=False)
    if from_peft:
        tensors = peft_adapter.fill_blocks(tensors, model)
    model.load_state_dict(tensors, strict=False)
    return model.eval()


def load_adapters(
    base: str | Path | BaseWeights,
    adapters: Mapping[str, str | Path],
    device: str | torch.device = "cpu",
) -> tuple[GPT2LMModel, dict[str, GPT2LMModel]]:
    """The base, and by name a model for each adapter, all on one copy of the base's weights: to
    call any of them is to switch adapters, to call the base is to use none."""
    base = base if isinstance(base, BaseWeights) else read_base(base)
    plain, _ = load(base, device=device)
    models = {}
    for name, path in adapters.items():
        models[name], _ = load(base, path, device)
        share_weights(models[name], dict(plain.named_parameters()))
    return plain, models


def share_weights(model: GPT2LMModel, weights: Mapping[str, Tensor]) -> None:
    """Let a model that is only run keep its weights where equal ones of the same names are."""
    for name, parameter in model.named_parameters():
        if name in weights and torch.equal(parameter, weights[name]):
            parameter.data = weights[name].data


def check_vocabulary(
    tokenizer: Tokenizer, folder: str, base: BaseWeights, header: AdapterHeader | None = None
) -> None:
    """Raise InputError for a vocabulary that is not the base's, or not the one that the adapter was
    trained with."""
    base.check_vocabulary(tokenizer, folder)
    trained = header and header.vocabulary
    if trained and not trained.is_of(tokenizer):
        raise InputError(f"--vocab {folder} is not the one that --adapter was trained with")


def parse_targets(text: str) -> tuple[str, ...]:
    """What `--lora_targets` names, each once and in the order of LORA_TARGETS."""
    named = [part.strip() for part in text.split(",")]
    names = {name for part in named for name in (ALL_TARGETS if part == "all" else (part,))}
    unknown = sorted(names - LORA_TARGETS.keys())
    if unknown:
        choices = ", ".join(LORA_TARGETS)
        raise InputError(f"--lora_targets {unknown[0]!r} is none of {choices} and all")
    return tuple(target for target in LORA_TARGETS if target in names)


def _settings_from_header(
    header: AdapterHeader, lora_dim: int | None, lora_alpha: float | None, model_card: str | None
) -> dict[str, Any]:
    """The header's settings as fields of `GPT2Config`, without dropout; what is given beside it
    must agree."""
    r, alpha = (header.lora.r, header.lora.alpha) if header.lora else (0, None)
    for flag, given, trained in (
        ("lora_dim", lora_dim, r),
        ("lora_alpha", lora_alpha, alpha),
        ("model_card", model_card, header.model_card),
    ):
        if None not in (given, trained) and given != trained:
            raise InputError(
                f"--{flag} {given} contradicts the adapter, which was trained with {trained}; "
                "leave the flag out"
            )
    config = header.lora and replace(header.lora, dropout=0.0)
    return {"lora": config, "bottleneck": header.bottleneck, "prefix": header.prefix}


def _settings_from_tensors(
    state: Mapping[str, Tensor], lora_dim: int | None, lora_alpha: float | None
) -> LoraConfig | None:
    """The settings of an adapter of the original code, which are read off its tensors."""
    pairs = {name: t for name, t in state.items() if name.endswith("c_attn.lora_B")}
    if not pairs:
        return None
    if lora_alpha is None:
        raise InputError("these files do not say which alpha the adapter has; give --lora_alpha")
    name, b = next(iter(pairs.items()))
    a = state.get(name.removesuffix("B") + "A")
    targets = None
    if a is not None and a.dim() == b.dim() == 2 and 0 not in (*a.shape, *b.shape):
        rank = b.size(1)
        parts, rest = divmod(len(a), rank)
        targets = {1: ("c_attn",), 2: ("q", "v"), 3: ("q", "k", "v")}.get(parts if not rest else 0)
    if targets is None:
        shape = "absent" if a is None else list(a.shape)
        raise InputError(
            f"tensor {name} of shape {list(b.shape)} and its lora_A, {shape}, are no adapter of q "
            "and v, of q, k and v, or of c_attn"
        )
    if lora_dim not in (None, rank):
        raise InputError(f"--lora_dim {lora_dim} contradicts the adapter's rank {rank}")
    try:
        return LoraConfig(rank, lora_alpha, targets=targets)
    except ValueError as error:
        raise InputError(f"--lora_alpha: {error}") from error


def apply_trained(model: GPT2LMModel, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Put an adapter file's tensors into a model; each must be known and fit."""
    check_trained(model, tensors, path)
    model.load_state_dict(tensors, strict=False)


def check_trained(
    model: GPT2LMModel, tensors: Mapping[str, Tensor], path: str | Path, complete: bool = True
) -> None:
    """Raise InputError, with file and tensor, unless the model has each tensor in its shape and,
    where they must be `complete`, no adapter tensor beside them."""
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            expected = list(own[name].shape) if name in own else "no such tensor"
            raise InputError(
                f"--adapter {path}: tensor {name} of shape {list(tensor.shape)} does not fit the "
                f"model, which has {expected}"
            )
        if not tensor.is_floating_point():
            raise InputError(f"--adapter {path}: tensor {name} holds {tensor.dtype}, not weights")
    missing = [name for name in own if is_added(name) and name not in tensors]
    if complete and missing:
        raise InputError(f"--adapter {path} lacks {len(missing)} tensors, first {missing[0]}")


def merge(model: GPT2LMModel) -> GPT2LMModel:
    """Put the model in eval mode with every adapter merged into its layer; returns the model."""
    for module in model.modules():
        if isinstance(module, LoRALayer):
            module.merge_weights = True
    return model.eval()
