"""Files of a run: base weights, adapters and training state. Safe to read, written whole or not.

An adapter file is `.safetensors` with exactly the trained tensors, and one metadata entry,
`adapter`: JSON that says what they are and which base they belong to. Nothing is unpickled.
"""

import argparse
import hashlib
import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import peft_adapter
import pretrained
from errors import InputError
from files import replacing
from model import (
    ALL_TARGETS,
    LORA_TARGETS,
    MODEL_CARDS,
    GPT2Config,
    GPT2LMModel,
    canonical_names,
)

FORMAT_VERSION = 1
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
BASE_FILES = ("model.safetensors", "pytorch_model.bin")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, `.bin` or `.pt` file, of a model folder, or of a model that
    `pretrained.find` knows by name; on the CPU.

    Raises:
        InputError: the file is absent, damaged, or holds anything but tensors.
    """
    path = pretrained.find(path)
    if path.is_dir():
        found = [path / name for name in BASE_FILES if (path / name).is_file()]
        if not found:
            raise InputError(f"{path} holds neither {' nor '.join(BASE_FILES)}")
        path = found[0]
    if not path.is_file():
        raise InputError(f"{path} does not exist; scripts/ has the download of GPT-2's weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[1]
    state = _read_pickle(path)
    state = state.get("model_state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(map(_is_named_tensor, state.items())):
        raise InputError(f"{path} is not a file of named tensors")
    return dict(state)


def _is_named_tensor(item: tuple[object, object]) -> bool:
    name, tensor = item
    plain = torch.is_tensor(tensor) and tensor.layout is torch.strided and not tensor.is_meta
    return isinstance(name, str) and plain


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error


def _read_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses about files that are damaged
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors and plain values, or is damaged; it was refused and "
            "nothing in it was run"
        ) from error
    except Exception as error:  # a damaged pickle fails in any way there is
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"{path} is damaged: {reason}") from error


def base_fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 over canonical names, shapes and fp32 values of the base, adapter tensors left out.

    Equal weights agree whatever file format, names or precision hold them.
    """
    tensors = canonical_names(state).items()
    return _fingerprint({name: tensor for name, tensor in tensors if "lora_" not in name})


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous().view(-1)
        digest.update(memoryview(values.numpy()).cast("B"))
    return digest.hexdigest()


def model_config(card: str, state: Mapping[str, Tensor] | None, **settings) -> GPT2Config:
    """The shape that `--model_card` names, with vocabulary and positions of the base `state`.

    Args:
        state: canonical names, or None for random weights of the card's own sizes.
        settings: fields of `GPT2Config` that rule over both.
    """
    if card not in MODEL_CARDS:
        raise InputError(f"--model_card {card} is unknown; give one of {', '.join(MODEL_CARDS)}")
    shape = dict(MODEL_CARDS[card])
    if state is not None:
        for field, name in (("vocab_size", "wte"), ("n_positions", "wpe")):
            table = state.get(f"transformer.{name}.weight")
            if table is not None and table.dim() == 2:
                shape[field] = table.size(0)
    try:
        return GPT2Config(**shape | settings)
    except ValueError as error:
        raise InputError(f"--lora_targets or the adapter's header: {error}") from error


def card_of(state: Mapping[str, Tensor]) -> str:
    """The card whose depth and width a base of canonical names has.

    Raises:
        InputError: no card fits.
    """
    depth = len({name.split(".")[2] for name in state if name.startswith("transformer.h.")})
    widths = [t.size(-1) for name, t in state.items() if name == "transformer.wte.weight"]
    for card, shape in MODEL_CARDS.items():
        if [shape["n_layer"], shape["n_embd"]] == [depth, *widths]:
            return card
    raise InputError(f"no model card has {depth} blocks and width {widths}; give --model_card")


def read_base(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a base checkpoint under canonical names."""
    try:
        state = canonical_names(read_tensors(path))
    except InputError as error:
        raise InputError(f"--init_checkpoint {path}: {error}") from error
    if state and all("lora_" in name for name in state):
        raise InputError(
            f"--init_checkpoint {path} holds an adapter without its base; give the base by "
            "--init_checkpoint and this file by --adapter"
        )
    return state


def load_base(model: GPT2LMModel, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load what `read_base` gave; errors name the file."""
    try:
        model.load_weight(state)
    except InputError as error:
        raise InputError(f"--init_checkpoint {path}: {error}") from error


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], header: dict) -> None:
    """Write trained tensors with their header and checksum; equal content gives equal bytes."""
    header = header | {"sha256": _seal(header, tensors)}
    metadata = {"adapter": json.dumps(header, sort_keys=True)}  # one entry: several have no order
    state = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    data = safetensors.torch.save(state, metadata)
    with replacing(path, "wb") as file:
        file.write(data)


def read_adapter(path: str | Path) -> tuple[dict | None, dict[str, Tensor]]:
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
    metadata, tensors = _read_safetensors(path)
    header = _parse_header(metadata, path)
    if header.pop("sha256", None) != _seal(header, tensors):
        raise InputError(f"--adapter {path} is damaged: it is not what was saved")
    return header, tensors


def _seal(header: dict, tensors: Mapping[str, Tensor]) -> str:
    content = json.dumps(header, sort_keys=True) + _fingerprint(tensors)
    return hashlib.sha256(content.encode()).hexdigest()


def _read_peft(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    config_path, tensors_path = (folder / name for name in PEFT_FILES)
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--adapter {config_path} is no JSON file: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"--adapter {config_path} is not PEFT's configuration of an adapter")
    metadata, own_header = {}, None
    if tensors_path.is_file():
        metadata, tensors = _read_safetensors(tensors_path)
    else:
        tensors = read_tensors(folder / "adapter_model.bin")
    if "adapter" in metadata:
        own_header = _parse_header(metadata, tensors_path)
    try:
        return peft_adapter.read(config, tensors, own_header)
    except InputError as error:
        raise InputError(f"--adapter {folder}: {error}") from error


def _parse_header(metadata: Mapping[str, str], path: Path) -> dict:
    try:
        header = json.loads(metadata["adapter"])
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"--adapter {path} has no adapter header; was it made here?") from error
    _check_header(header, path)
    return header


HEADER_TYPES = {
    "format": int, "model_card": str, "r": int, "alpha": int | float, "base": dict, "kind": str,
    "targets": list,
}  # fmt: skip


def _check_header(header: object, path: Path) -> None:
    fields = header if isinstance(header, dict) else {}
    version = fields.get("format")
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise InputError(f"--adapter {path} has format {version}, this program reads 1")
    wrong = [key for key, kind in HEADER_TYPES.items() if not isinstance(fields.get(key), kind)]
    wrong += ["targets"] * any(not isinstance(target, str) for target in fields.get("targets", []))
    wrong += [f"base {key}" for key in ("name", "fingerprint") if key not in fields.get("base", [])]
    if wrong:
        raise InputError(
            f"--adapter {path} has no good {wrong[0]} in its header; was it made here?"
        )


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
) -> tuple[GPT2LMModel, dict | None]:
    """As `load_with_adapter`, merged, in eval mode."""
    model, header = load_with_adapter(args, base)
    return merge(model), header


def load_with_adapter(
    args: argparse.Namespace, base: Mapping[str, Tensor] | None = None
) -> tuple[GPT2LMModel, dict | None]:
    """The model that `--init_checkpoint` and `--adapter` describe, on `args.device`, and the
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
        fingerprint = header["base"]["fingerprint"]
        if fingerprint not in (None, base_fingerprint(base)) and not args.allow_other_base:
            raise InputError(
                f"--init_checkpoint {args.init_checkpoint} is not the base that the adapter was "
                f"trained on ({header['base']['name']}); give that one, or --allow_other_base"
            )
    card = (header and header["model_card"]) or args.model_card or card_of(base)
    model = GPT2LMModel(model_config(card, base, **settings))
    load_base(model, base, args.init_checkpoint)
    if header is not None and header["model_card"] is None:
        tensors = peft_adapter.fill_blocks(tensors, model)
    apply_trained(model, tensors, args.adapter)
    return model.to(args.device), header


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


def _settings_from_header(header: dict, args: argparse.Namespace) -> dict:
    for flag, field in (("lora_dim", "r"), ("lora_alpha", "alpha"), ("model_card", "model_card")):
        given = getattr(args, flag)
        if None not in (given, header[field]) and given != header[field]:
            raise InputError(
                f"--{flag} {given} contradicts the adapter, which was trained with "
                f"{header[field]}; leave the flag out"
            )
    if not header["r"]:
        return {}
    return {
        "lora_attn_dim": header["r"],
        "lora_attn_alpha": header["alpha"],
        "lora_targets": header["targets"],
        "lora_kind": header["kind"],
        "use_rslora": header.get("rslora", False),
    }


def _settings_from_tensors(state: Mapping[str, Tensor], args: argparse.Namespace) -> dict:
    pairs = {name: t for name, t in state.items() if name.endswith("c_attn.lora_B")}
    if not pairs:
        return {}
    if args.lora_alpha is None:
        raise InputError("these files do not say which alpha the adapter has; give --lora_alpha")
    name, b = next(iter(pairs.items()))
    rank, rows = b.size(-1), len(state.get(name.removesuffix("B") + "A", ()))
    targets = {1: ("c_attn",), 2: ("q", "v"), 3: ("q", "k", "v")}.get(rows // rank)
    if targets is None:
        raise InputError(f"tensor {name} of shape {list(b.shape)} does not go with its lora_A")
    if args.lora_dim not in (None, rank):
        raise InputError(f"--lora_dim {args.lora_dim} contradicts the adapter's rank {rank}")
    return {"lora_attn_dim": rank, "lora_attn_alpha": args.lora_alpha, "lora_targets": targets}


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


def save_training_state(path: str | Path, state: dict) -> None:
    """Write all that a run needs to go on; tensors and plain values only."""
    # Written in memory first: on a full disk torch's own writer fails without an OSError.
    data = io.BytesIO()
    torch.save(state, data)
    with replacing(path, "wb") as file:
        file.write(data.getbuffer())


def read_training_state(path: str | Path) -> dict:
    """What `save_training_state` wrote, every byte of it."""
    state = _read_pickle(Path(path))
    if not _has_its_checksums(path):
        raise InputError(
            f"--resume {path} is damaged; put a copy there, or start anew in another --work_dir"
        )
    if not isinstance(state, dict) or state.get("format") != FORMAT_VERSION:
        raise InputError(f"--resume {path} is not a training state of this program")
    return state


def _has_its_checksums(path: str | Path) -> bool:
    """Whether all parts of one of torch's archives have the checksums that were stored with them;
    torch.load does not look at these."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive fails in a dozen ways, and any is an answer
        return False
