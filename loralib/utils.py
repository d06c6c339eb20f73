"""Which tensors of a model are its adapter, which of them are trained, and where they start."""

from torch import Tensor, nn

from .layers import LoRALayer


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Train the adapters in `model` and the biases that `bias` names; freeze all the rest.

    bias is "none", "all" (each bias of the model) or "lora_only" (those of adapted layers);
    ValueError for anything else.
    """
    trained = {id(parameter) for parameter in _adapter(model, bias).values()}
    for layer in _adapted_layers(model):
        trained -= {id(getattr(layer, name)) for name in layer.frozen_names}
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in trained


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Name → tensor of the adapters and the biases that `bias` names, memory shared: all that
    `mark_only_lora_as_trainable(model, bias)` trains, and what LoRA-FA and PiSSA keep frozen.

    Names are the bare model's, also if DDP, DataParallel or torch.compile wraps it or a part.
    """
    while [name for name, _ in model.named_children()] in (["module"], ["_orig_mod"]):
        model = next(model.children())
    parameters = _adapter(model, bias)
    return {name.replace("_orig_mod.", ""): p.detach() for name, p in parameters.items()}


def start_from_base(model: nn.Module) -> None:
    """Let DoRA and PiSSA adapters start from the weights that `model` has now."""
    for layer in _adapted_layers(model):
        layer.start_from_base()


def _adapted_layers(model: nn.Module) -> list[LoRALayer]:
    return [m for m in model.modules() if isinstance(m, LoRALayer) and m.adapted]


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
