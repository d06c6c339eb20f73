"""Base weights: the files and names they come in, the cards they fit, and their fingerprint.

Nothing is unpickled.
"""

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from tokenizers import Tokenizer
from torch import Tensor

from checkpoints import hub
from checkpoints.config import read_config, sizes_of
from common.errors import InputError
from methods import is_added
from model import MODEL_CARDS, GPT2Config, GPT2LMModel

BASE_FILES = ("model.safetensors", "pytorch_model.bin")
RANDOM_CARD = "gpt2.md"
# Of each adapter that `GPT2Config` takes, the flag of what a model may be unable to have.
ADAPTER_FLAGS = {
    "lora": "--lora_targets",
    "bottleneck": "--adapter_dim",
    "prefix": "--prefix_length",
}
MOST_PADDING = 128  # rows that an embedding may have beyond its vocabulary
OLD_SUFFIXES = {".g": ".weight", ".b": ".bias", ".w": ".weight"}


def weight_files(path: str | Path) -> list[Path]:
    """Return the files of weights that are at a path: itself, or those of a model folder."""
    candidates = (Path(path), *(Path(path) / name for name in BASE_FILES))
    return [file for file in candidates if file.is_file()]


def read_tensors(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, `.bin` or `.pt` file, of a model folder, or of a model that
    `hub.find` knows by name; on the CPU, or on the device meta without their values.

    Raises:
        InputError: the file is absent, damaged, or holds anything but tensors.
    """
    path = hub.find(path)
    if path.is_dir():
        found = [path / name for name in BASE_FILES if (path / name).is_file()]
        if not found:
            raise InputError(f"{path} holds neither {' nor '.join(BASE_FILES)}")
        path = found[0]
    if not path.is_file():
        names = ", ".join(hub.REPOSITORIES)
        raise InputError(f"{path} does not exist; give a file, a model folder, or one of {names}")
    # A .safetensors file is mapped: its values are read when they are needed.
    tensors = read_safetensors(path)[1] if path.suffix == ".safetensors" else _read_named(path)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _read_named(path: Path) -> dict[str, Tensor]:
    state = read_pickle(path)
    state = state.get("model_state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in state.items()
    ):
        raise InputError(f"{path} is not a file of named tensors")
    return dict(state)


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a `.safetensors` file."""
    _check_readable(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error


def read_pickle(path: Path) -> object:
    """What `torch.save` wrote: tensors and plain values, of no more bytes than the file has."""
    _check_readable(path)
    try:
        _refuse_bomb(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses about files that are damaged
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors and plain values, or is damaged; it was refused and "
            "nothing in it was run"
        ) from error
    except InputError:
        raise
    except Exception as error:  # a damaged pickle fails in any way there is
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"{path} is damaged: {reason}") from error
    for tensor in _tensors_in(content):
        if tensor.layout is not torch.strided or tensor.is_meta or _larger_than_stored(tensor):
            raise InputError(f"{path} holds a tensor {list(tensor.shape)} without all its values")
    return content


def _check_readable(path: Path) -> None:
    """Raise InputError for a file that may not be read, which is not damaged."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _refuse_bomb(path: Path) -> None:
    """Raise InputError for an archive that unpacks to more than it is: torch packs nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > path.stat().st_size:
            raise InputError(f"{path} unpacks to {size:,} bytes, more than it has; it was refused")


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested containers; what they share is visited once."""
    seen, pending = set(), [value]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if torch.is_tensor(item):
            yield item
        elif isinstance(item, Mapping):
            pending += item.values()
        elif isinstance(item, list | tuple | set):
            pending += item


def _larger_than_stored(tensor: Tensor) -> bool:
    """Whether elements share their memory, as in a tensor that was expanded."""
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()


def canonical_name(name: str) -> str:
    """The name under which `GPT2LMModel.state_dict()` holds a tensor of a known file format."""
    for prefix in ("module.", "_orig_mod.", "module.", "transformer."):
        name = name.removeprefix(prefix)
    if name[-2:] in OLD_SUFFIXES:
        name = name[:-2] + OLD_SUFFIXES[name[-2:]]
    return f"transformer.{name}"


def canonical_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A new dict with this model's names, without stored causal masks and the tied head.

    Raises:
        InputError: the head is not tied to the embedding, or two names mean one tensor.
    """
    state_dict = cast(Any, state_dict).get("model_state_dict", state_dict)
    state: dict[str, Tensor] = {}
    heads: list[Tensor] = []
    for key, tensor in state_dict.items():
        name = canonical_name(key)
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if name in ("transformer.lm_head.weight", "transformer.lm_head.decoder.weight"):
            heads.append(tensor)
            continue
        if name in state:
            raise InputError(f"the checkpoint holds tensor {name} twice, the second time as {key}")
        state[name] = tensor
    embedding = state.get("transformer.wte.weight")
    for head in heads:
        is_tied = embedding is not None and (head.is_meta or torch.equal(head, embedding))
        if not is_tied:
            raise InputError("tensor lm_head.weight differs from wte.weight; GPT-2's head is tied")
    return _as_lora(state)


def _as_lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with adapters of older layouts under today's names and shapes.

    The first release of the original code kept q and v apart, as `q_proj_adapter1` (A) and
    `q_proj_adapter2` (B); B may be stored as the weight of a convolution, (out, r, 1).
    """
    for name in [name for name in state if name.endswith(".q_proj_adapter1.weight")]:
        attention = name.removesuffix("q_proj_adapter1.weight")
        for number, new in (("1", "lora_A"), ("2", "lora_B")):
            old = [f"{attention}{part}_proj_adapter{number}.weight" for part in "qv"]
            if missing := [key for key in old if key not in state]:
                raise InputError(f"the adapter lacks tensor {missing[0]}")
            q, v = (state.pop(key) for key in old)
            if q.dim() not in (2, 3) or q.shape != v.shape:
                raise InputError(
                    f"tensors {old[0]} {list(q.shape)} and {old[1]} {list(v.shape)} must be "
                    "matrices of one shape"
                )
            state[f"{attention}c_attn.{new}"] = torch.cat((q, v))
    for name, tensor in state.items():
        if name.endswith(".lora_B") and tensor.dim() == 3 and tensor.size(2) == 1:
            state[name] = tensor.squeeze(2)
    return state


def base_fingerprint(state: Mapping[str, Tensor], unusual: Mapping[str, Any] | None = None) -> str:
    """sha256 over canonical names, shapes and fp32 values of the base, adapter tensors left out,
    and over what is `unusual` in its shape, such as another number of heads than the card's.

    Equal weights agree whatever file format, names or precision hold them.
    """
    tensors = canonical_names(state).items()
    weights = fingerprint({name: tensor for name, tensor in tensors if not is_added(name)})
    if not unusual:
        return weights
    return hashlib.sha256((weights + json.dumps(unusual, sort_keys=True)).encode()).hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous().view(-1)
        digest.update(cast(memoryview, values.numpy().data).cast("B"))
    return digest.hexdigest()


@dataclass(frozen=True)
class BaseWeights:
    """A base checkpoint as it was read: canonical names, the file or name that it came from, and
    what its config.json says of the model beyond the shapes of the tensors."""

    source: str
    tensors: dict[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return Path(self.source).name

    @property
    def vocab_size(self) -> int:
        return self._table("wte").size(0)

    @property
    def n_positions(self) -> int:
        return self._table("wpe").size(0)

    @cached_property
    def fingerprint(self) -> str:
        """`base_fingerprint` of the tensors and of what the card has otherwise, computed once."""
        return base_fingerprint(self.tensors, self.unusual)

    @cached_property
    def unusual(self) -> dict[str, Any]:
        """What the config sets in another way than the card of these weights."""
        usual = vars(GPT2Config()) | MODEL_CARDS[card_of(self.tensors)] if self.config else {}
        return {name: value for name, value in self.config.items() if value != usual[name]}

    def card(self, given: str | None = None) -> str:
        """Return the model card of these weights, which the `given` one, if any, must be.

        Raises:
            InputError: it is another, or no card fits and none is given.
        """
        try:
            own = card_of(self.tensors)
        except InputError:
            if given is None:
                raise
            return given
        if given not in (None, own) and given in MODEL_CARDS:
            raise InputError(
                f"--model_card {given} contradicts --init_checkpoint {self.source}: these weights "
                f"are {own}'s; leave --model_card out"
            )
        return given or own

    def check_vocabulary(self, tokenizer: Tokenizer, folder: str) -> None:
        """Raise InputError unless the vocabulary in `folder` is one for these embeddings, which may
        have some rows more: tokens that were added, or padding."""
        size, rows = tokenizer.get_vocab_size(), self.vocab_size
        if not 0 <= rows - size < MOST_PADDING:
            raise InputError(
                f"--vocab {folder} has {size} entries but --init_checkpoint {self.source} {rows}; "
                "give the vocabulary of that base"
            )

    def _table(self, name: str) -> Tensor:
        name = f"transformer.{name}.weight"
        table = self.tensors.get(name)
        if table is None or table.dim() != 2 or 0 in table.shape:
            fault = "is missing" if table is None else f"has shape {list(table.shape)}"
            raise InputError(
                f"--init_checkpoint {self.source}: tensor {name} {fault}; it must be a table with "
                "a row for each entry"
            )
        return table


def read_shapes(path: str | Path) -> BaseWeights:
    """As `read_base`, with tensors on the device meta, which have no values. Nothing is downloaded:
    a published base that is not at hand has the shapes of its card."""
    name = hub.published_name(path)
    if name is None or hub.at_hand(path) is not None:
        return read_base(path, "meta")
    shape: dict[str, Any] = dict(MODEL_CARDS[hub.CARDS[name]])
    with torch.device("meta"):
        return BaseWeights(str(path), GPT2LMModel(GPT2Config(**shape)).state_dict())


def read_base(path: str | Path, device: str = "cpu") -> BaseWeights:
    """Read a base checkpoint: a file, a model folder, or a published name."""
    try:
        found = hub.find(path)
        tensors = read_tensors(found, device)
        state = canonical_names(tensors)
        folder = found if found.is_dir() else found.parent
        config = {}
        if (found.is_dir() or found.name in BASE_FILES) and (folder / "config.json").is_file():
            has_head = any(name.endswith("lm_head.weight") for name in tensors)
            config = read_config(folder / "config.json", state, has_head)
    except InputError as error:
        raise InputError(f"--init_checkpoint {path}: {error}") from error
    if state and all(is_added(name) for name in state):
        raise InputError(
            f"--init_checkpoint {path} holds an adapter without its base; give the base by "
            "--init_checkpoint and this file by --adapter"
        )
    return BaseWeights(str(path), state, config)


def model_config(card: str | None, base: BaseWeights | None, **settings: Any) -> GPT2Config:
    """Return the shape of a base, or of a card where the weights are random.

    Args:
        card: what `--model_card` names; None for the card of the base, or gpt2.md without one.
        base: None for random weights.
        settings: fields of `GPT2Config` that rule over both.
    """
    if card is not None and card not in MODEL_CARDS:
        raise InputError(f"--model_card {card} is unknown; give one of {', '.join(MODEL_CARDS)}")
    shape: dict[str, Any] = dict(MODEL_CARDS[base.card(card) if base else card or RANDOM_CARD])
    if base is not None:
        shape |= {"vocab_size": base.vocab_size, "n_positions": base.n_positions, **base.config}
    try:
        return GPT2Config(**shape | settings)
    except ValueError as error:
        flags = [flag for name, flag in ADAPTER_FLAGS.items() if settings.get(name) is not None]
        source = " or ".join([*flags, "the adapter's header"])
        raise InputError(f"{source}: {error}") from error


def check_window(seq_len: int, n_positions: int, virtual_tokens: int = 0) -> None:
    """Raise InputError unless `seq_len` tokens have a position each after a prefix."""
    if seq_len + virtual_tokens > n_positions:
        prefix = advice = ""
        if virtual_tokens:
            prefix = f" with a prefix of {virtual_tokens}"
            advice = f"; give at most {n_positions - virtual_tokens}"
        raise InputError(f"--seq_len {seq_len}{prefix} is above the model's {n_positions}{advice}")


def check_room(flag: str, eval_len: int, window: int) -> None:
    """Raise InputError unless a window has room for `eval_len` tokens, which the flag asks for, and
    one of a context."""
    if eval_len >= window:
        raise InputError(
            f"--{flag} {eval_len} leaves no room for a context in a window of {window} tokens; "
            f"give at most {window - 1}"
        )


def card_of(state: Mapping[str, Tensor]) -> str:
    """Return the card whose depth and width a base of canonical names has.

    Raises:
        InputError: no card fits.
    """
    sizes = sizes_of(state)
    depth, width = sizes["n_layer"], sizes.get("n_embd")
    for card, shape in MODEL_CARDS.items():
        if (shape["n_layer"], shape["n_embd"]) == (depth, width):
            return card
    raise InputError(
        f"no model card has {depth} blocks and width {width}; the cards are "
        f"{', '.join(MODEL_CARDS)}"
    )


def load_base(model: GPT2LMModel, base: BaseWeights) -> None:
    """Copy a base into a model; errors name its file."""
    check_base(model, base)
    model.load_state_dict(base.tensors, strict=False)


def check_base(model: GPT2LMModel, base: BaseWeights) -> None:
    """As `check_weights`; errors name the file."""
    try:
        check_weights(model, base.tensors)
    except InputError as error:
        raise InputError(f"--init_checkpoint {base.source}: {error}") from error


def load_weights(model: GPT2LMModel, state_dict: Mapping[str, Tensor]) -> None:
    """Copy base weights into a model, with or without an adapter, under any of the names in use.

    Takes what HF's GPT-2 files, the original's `.pt` files and `state_dict()` hold. Adapter
    tensors may be absent from the file; all else must be there, fit, and be known.

    Raises:
        InputError: names the first tensors that are missing, unknown or of another shape.
    """
    state = canonical_names(state_dict)
    check_weights(model, state)
    model.load_state_dict(state, strict=False)


def check_weights(model: GPT2LMModel, state: Mapping[str, Tensor]) -> None:
    """Raise InputError unless `state`, of canonical names, has every base tensor of the model, in
    its shape, and none that the model does not know. The model may be on the meta device."""
    own = model.state_dict()
    unknown = sorted(state.keys() - own.keys())
    missing = sorted(own.keys() - state.keys())
    if not any(is_added(name) for name in state):
        missing = [name for name in missing if not is_added(name)]
    _refuse(unknown, "tensors this model does not have; is --model_card or --lora_dim right?")
    _refuse(missing, "missing tensors; a base checkpoint must hold the whole model")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise InputError(
                f"tensor {name} has shape {list(tensor.shape)} in the checkpoint but "
                f"{list(own[name].shape)} in the model; is --model_card or --lora_dim right?"
            )
        if not tensor.is_floating_point():
            raise InputError(f"tensor {name} holds {tensor.dtype}, not floating-point weights")


def _refuse(names: list[str], problem: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(f"the checkpoint has {problem} ({', '.join(names[:3])}{more})")
