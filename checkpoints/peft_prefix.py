"""PEFT's prefixes of GPT-2 (PREFIX_TUNING) as prefixes of this repository, and back.

Whether or not PEFT trained the prefix by a generator (`prefix_projection`), its folder has what is
left after training: one tensor, `prompt_embeddings` (n, L·2·C), in each row key and value of each
layer. These are the numbers that stand here in `transformer.prefix.key_values` (n, L, 2, C).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from checkpoints.base import BaseWeights
from checkpoints.header import LARGEST_PREFIX, AdapterHeader, Base
from common.errors import InputError
from methods.prefix import KEY_VALUES, PARTS, PrefixConfig
from model import MODEL_CARDS, GPT2Config

PEFT_TYPE, TENSOR = "PREFIX_TUNING", "prompt_embeddings"
# Settings that are read. Of the rest, these say how it was trained or where it came from; any other
# is refused if it is set.
SIZES = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
READ = {*SIZES, "peft_type", "num_transformer_submodules"}
WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "prefix_projection", "encoder_hidden_size", "init_weights", "runtime_config",
}  # fmt: skip


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    own_header: AdapterHeader | None = None,
    base: BaseWeights | None = None,
) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Return header and tensors, as of a file of this repository, for a prefix that PEFT wrote.

    The header is `own_header` where the folder was exported here and its numbers are still of that
    length; otherwise it has no model card and no fingerprint of the base.

    Raises:
        InputError: it has a setting or a tensor that has no place here.
    """
    try:
        length, layers, width = _sizes(config, base)
        if list(tensors) != [TENSOR]:
            names = ", ".join(f"{name:.60}" for name in sorted(tensors)[:3]) or "none"
            raise ValueError(f"its tensors are {names}; a prefix is {TENSOR} alone")
        numbers, shape = tensors[TENSOR], [length, layers * PARTS * width]
        if list(numbers.shape) != shape:
            raise ValueError(f"{TENSOR} is {list(numbers.shape)}, by its configuration {shape}")
    except ValueError as error:
        raise InputError(f"this PEFT prefix cannot be read: {error}") from error
    name = config.get("base_model_name_or_path")
    header = AdapterHeader(
        lora=None,
        base=Base(name if isinstance(name, str) else None),
        method="prefix",
        prefix=PrefixConfig(length),
    )
    if own_header is not None and own_header.prefix == header.prefix:
        header = own_header
    return header, {KEY_VALUES: numbers.reshape(length, layers, PARTS, width)}


def _sizes(config: Mapping[str, Any], base: BaseWeights | None) -> tuple[int, int, int]:
    """Length, layers and width of a prefix; ValueError for a setting that cannot be honoured."""
    for key, value in config.items():
        if value and key not in READ | WITHOUT_EFFECT:
            raise ValueError(f"{key:.60} is set, which has no counterpart here")
    sizes = {key: _whole(key, config.get(key)) for key in SIZES}
    if config.get("num_transformer_submodules") not in (None, 1):
        raise ValueError("num_transformer_submodules is not 1, but GPT-2 is one transformer")
    heads = sizes["num_attention_heads"]
    if base is not None and heads != (own := _heads(base) or heads):
        raise ValueError(f"num_attention_heads is {heads}, the base has {own}")
    return sizes["num_virtual_tokens"], sizes["num_layers"], sizes["token_dim"]


def _heads(base: BaseWeights) -> int | None:
    """The heads of a base by its config.json or its card; None where neither is known."""
    try:
        return base.config.get("n_head") or MODEL_CARDS[base.card()]["n_head"]
    except InputError:
        return None


def _whole(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST_PREFIX:
        raise ValueError(f"{key} is {value!r:.40}, not a number from 1 to {LARGEST_PREFIX}")
    return value


def write(
    model: GPT2Config, tensors: Mapping[str, Tensor], header: AdapterHeader, base_name: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Configuration, tensors and file metadata of the PEFT folder for a prefix of such a model,
    whose base PEFT finds as `base_name`."""
    numbers = tensors[KEY_VALUES]
    config = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "num_virtual_tokens": len(numbers),
        "num_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_transformer_submodules": 1,
        "token_dim": model.n_embd,
        "prefix_projection": False,
        "encoder_hidden_size": None,
    }
    metadata = {"format": "pt", "adapter": header.to_json()}
    return config, {TENSOR: numbers.flatten(1)}, metadata
