"""Adapters put into, and taken out of, any model made of torch's layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .conv import Conv1d, Conv2d, Conv3d
from .layers import Embedding, Linear, LoRALayer

CONVOLUTIONS: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
}
CONV_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode")
EMBEDDING_SETTINGS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


def inject(model: nn.Module, targets: Sequence[str], **settings: Any) -> nn.Module:
    """Give the named layers of `model` adapters, in place; returns the model.

    A target is a module's whole name or how it ends: "attn.c_proj" names every `….attn.c_proj`.
    nn.Linear, nn.Embedding, nn.Conv1d to 3d and transformers' Conv1D can be adapted. The adapted
    layers hold the model's own parameters, so outputs are the same, bit for bit, and what is tied
    stays tied; PiSSA's are the same to rounding.

    Args:
        settings: as the layers take them: r, lora_alpha, lora_dropout, use_rslora, kind …

    Raises:
        ValueError: a target names no module, or one of another type.
    """
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        every = model.named_modules(remove_duplicate=False)
        found = {n: m for n, m in every if n and f".{n}".endswith(f".{target}")}
        if not found:
            raise ValueError(f"target {target!r} names no module of the {type(model).__name__}")
        chosen |= found
    adapted = {module: _adapted(name, module, settings) for name, module in chosen.items()}
    for name, module in chosen.items():
        adapted[module].base_weight.requires_grad_(False)
        model.set_submodule(name, adapted[module])
    return model


def remove_adapters(model: nn.Module) -> nn.Module:
    """Put the layers that `inject` replaced back, with the parameters that they have now; the
    adapters are lost. Returns the model."""
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, LoRALayer) and layer.replaced is not None:
            module, required_grad = layer.replaced
            for own in module._parameters:
                module._parameters[own] = layer._parameters[own]
            module.get_parameter("weight").requires_grad_(required_grad)
            model.set_submodule(name, module.train(layer.training))
    return model


def _adapted(name: str, module: nn.Module, settings: dict[str, Any]) -> LoRALayer:
    """A layer with an adapter that holds the parameters of `module`."""
    layer = _empty_like(name, module, settings)
    if not layer.adapted:
        raise ValueError(f"{name} needs a rank r above 0, got {layer.r}")
    weight = module.get_parameter("weight")
    for own, parameter in module.named_parameters(recurse=False):
        setattr(layer, own, parameter)
    for own, parameter in list(layer.named_parameters(recurse=False)):
        if own.startswith("lora_"):
            filled = torch.zeros(parameter.shape, dtype=weight.dtype, device=weight.device)
            setattr(layer, own, nn.Parameter(filled, requires_grad=parameter.requires_grad))
    layer._reset_adapter()
    layer.start_from_base()
    layer.replaced = module, weight.requires_grad  # in a tuple it is no child of the layer
    return layer.train(module.training)


def _empty_like(name: str, module: Any, settings: dict[str, Any]) -> LoRALayer:
    """A layer of the module's shape on the meta device; the module may be of any class."""
    kind = type(module)
    bias = getattr(module, "bias", None) is not None
    settings = settings | {"device": "meta"}
    if kind is nn.Linear:
        return Linear(module.in_features, module.out_features, bias=bias, **settings)
    if kind.__name__ == "Conv1D" and module.weight.dim() == 2:  # transformers' (in, out) linear
        inputs, outputs = module.weight.shape
        return Linear(inputs, outputs, fan_in_fan_out=True, **settings)
    if kind is nn.Embedding:
        same = {key: getattr(module, key) for key in EMBEDDING_SETTINGS}
        return Embedding(module.num_embeddings, module.embedding_dim, **same, **settings)
    if kind in CONVOLUTIONS:
        same = {key: getattr(module, key) for key in CONV_SETTINGS}
        sizes = module.in_channels, module.out_channels, module.kernel_size
        return CONVOLUTIONS[kind](*sizes, bias=bias, **same, **settings)
    raise ValueError(f"{name} is a {kind.__name__}, which cannot be adapted")
