"""transformers' config.json: what it says of a GPT-2 beyond the shapes of its weights is taken over
where this model can be it, and refused by name where it cannot; a model made here gets one."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import InputError
from common.json_text import JSONFault, parse_json
from common.text_files import TextFile
from model import GPT2Config

# Settings that would make another model of equal weights, and the values that this model has.
FIXED: dict[str, tuple[object, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
}


def read_config(file: Path, state: Mapping[str, Tensor], has_head: bool) -> dict[str, Any]:
    """Return `n_head` and `layer_norm_epsilon` as a config.json has them.

    Other settings of transformers' GPT2Config have no effect on logits: dropouts, whether and how
    hidden states are summed up, ids of special tokens.

    Args:
        state: the base's tensors, whose shapes the file must agree with.
        has_head: whether the weights came with a head of their own, equal to the embedding.

    Raises:
        InputError: names the setting that this model cannot have, or that the weights contradict.
    """
    with TextFile(file) as text:
        content = text.read()
    try:
        config = parse_json(content)
    except JSONFault as fault:
        raise InputError(f"{file}, line {fault.line}: {fault}") from fault
    if not isinstance(config, dict):
        raise InputError(f"{file} is no configuration: it must hold an object")
    for name, reason in _faults(config, sizes_of(state), has_head):
        raise InputError(f"{file}: {name} is {config.get(name)!r:.40}, {reason}")
    return {name: config[name] for name in ("n_head", "layer_norm_epsilon") if name in config}


def _faults(
    config: Mapping[str, Any], sizes: Mapping[str, int], has_head: bool
) -> Iterator[tuple[str, str]]:
    """Each setting that cannot be taken, and why."""
    for name, accepted in FIXED.items():
        if name in config and config[name] not in accepted:
            yield name, f"and this model has {accepted[0]!r}"
    for name, size in sizes.items():
        if config.get(name) not in (None, size):
            yield name, f"but the weights have {size}"
    if config.get("tie_word_embeddings") is False and not has_head:
        yield "tie_word_embeddings", "but the weights have no lm_head.weight"
    heads, width = config.get("n_head", 1), sizes.get("n_embd", 0)
    if type(heads) is not int or heads < 1 or width % heads:
        yield "n_head", f"which does not divide the width {width}"
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        yield "layer_norm_epsilon", "which is not between 0 and 1"


def transformers_config(
    config: GPT2Config, end_of_text: int | None, tied: bool = True
) -> dict[str, Any]:
    """Return the config.json by which transformers loads this model, in fp32; `tied` says that the
    head is the embedding."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": config.initializer_range,
        "activation_function": "gelu_new",
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the settings that the shapes of a base's tensors say."""
    tables = {"wte": ("vocab_size", "n_embd"), "wpe": ("n_positions", "n_embd")}
    sizes = {"n_layer": len({n.split(".")[2] for n in state if n.startswith("transformer.h.")})}
    for table, names in tables.items():
        tensor = state.get(f"transformer.{table}.weight")
        if tensor is not None and tensor.dim() == 2:
            sizes |= dict(zip(names, tensor.shape, strict=True))
    hidden = state.get("transformer.h.0.mlp.c_fc.weight")
    if hidden is not None and hidden.dim() == 2:
        sizes["n_inner"] = hidden.size(1)
    return sizes
