"""Which tensors of a model are its adapter: what is trained and what is saved are one set."""

from torch import Tensor, nn

from .layers import LoRALayer


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Train the adapters in `model` and the biases that `bias` names; freeze all the rest.

    bias is "none", "all" (each bias of the model) or "lora_only" (those of adapted layers);
    ValueError for anything else.
    """
    trained = {id(parameter) for parameter in _trained(model, bias).values()}
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in trained


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Name → tensor of all that `mark_only_lora_as_trainable(model, bias)` trains, memory shared.

    Names are the bare model's, also if DDP, DataParallel or torch.compile wraps it or a part.
    """
    while [name for name, _ in model.named_children()] in (["module"], ["_orig_mod"]):
        model = next(model.children())
    parameters = _trained(model, bias)
    return {name.replace("_orig_mod.", ""): p.detach() for name, p in parameters.items()}


def _trained(model: nn.Module, bias: str) -> dict[str, nn.Parameter]:
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias must be "none", "all" or "lora_only", not {bias!r}')
    trained = {}
    for name, parameter in model.named_parameters():
        owner, _, own_name = name.rpartition(".")
        layer = model.get_submodule(owner)
        adapted = isinstance(layer, LoRALayer) and layer.adapted
        bias_chosen = bias == "all" or (bias == "lora_only" and adapted)
        if (adapted and own_name.startswith("lora_")) or (bias_chosen and "bias" in own_name):
            trained[name] = parameter
    return trained
