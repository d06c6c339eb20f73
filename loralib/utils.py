"""Which tensors of a model are its adapter, which of them are trained, and where they start."""

import warnings

from torch import Tensor, nn

from .layers import STATE_DICT_WARNING, LoRALayer


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Train the adapters in `model` and the biases that `bias` names; freeze all the rest.

    bias is "none", "all" (each bias of the model) or "lora_only" (those of adapted layers);
    ValueError for anything else.
    """
    trained = {id(parameter) for parameter in _adapter(model, bias).values()}
    for layer in adapted_layers(model).values():
        trained -= {id(getattr(layer, name)) for name in layer.frozen_names}
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in trained


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Name → tensor of the adapters and the biases that `bias` names, memory shared: all that
    `mark_only_lora_as_trainable(model, bias)` trains, and what LoRA-FA and PiSSA keep frozen.

    Names are the bare model's, also if DDP, DataParallel or torch.compile wraps it or a part.
    """
    parameters = _adapter(_bare(model), bias)
    return {_bare_name(name): parameter.detach() for name, parameter in parameters.items()}


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the same model without adapters, W0 + delta in the place of each W0.

    This is what to deploy: it loads into the plain torch model. Merged weights are new tensors in
    the dtype of W0, the others share memory with the model, which stays as it is, merged or not.
    Names are the bare model's, as in `lora_state_dict`. A tensor that is tied to an adapted weight
    keeps its own value.
    """
    model = _bare(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", STATE_DICT_WARNING)
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, layer in adapted_layers(model).items():
        prefix = f"{name}." if name else ""
        for own in [own for own in layer._parameters if own.startswith("lora_")]:
            del state[prefix + own]
        state[f"{prefix}weight"] = layer.merged_weight()
    return {_bare_name(name): tensor for name, tensor in state.items()}


def start_from_base(model: nn.Module) -> None:
    """Let DoRA and PiSSA adapters start from the weights that `model` has now."""
    for layer in adapted_layers(model).values():
        layer.start_from_base()


def adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The layers that have an adapter, by each of their names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: m for name, m in modules if isinstance(m, LoRALayer) and m.adapted}


def _bare(model: nn.Module) -> nn.Module:
    """The model within what DDP, DataParallel or torch.compile puts around it."""
    while [name for name, _ in model.named_children()] in (["module"], ["_orig_mod"]):
        model = next(model.children())
    return model


def _bare_name(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _adapter(model: nn.Module, bias: str) -> dict[str, nn.Parameter]:
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias must be "none", "all" or "lora_only", not {bias!r}')
    chosen = {}
    for name, parameter in model.named_parameters():
        owner, _, own_name = name.rpartition(".")
        layer = model.get_submodule(owner)
        adapted = isinstance(layer, LoRALayer) and layer.adapted
        bias_chosen = bias == "all" or (bias == "lora_only" and adapted)
        if (adapted and own_name.startswith("lora_")) or (bias_chosen and "bias" in own_name):
            chosen[name] = parameter
    return chosen
