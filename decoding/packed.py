"""A model's weights laid out, or rounded, once for fast decoding."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpu
import loralib
from model import GPT2LMModel


class PackedLinear(nn.Module):
    """A linear map on a CPU, its weight laid out once the way oneDNN's kernels read it, which with
    `gelu` apply that to what they have just computed.

    Up to twice as fast as F.linear on the few rows of a decoding step; for inference only.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> None:
        """`weight` is (out, in), fp32, on the CPU."""
        super().__init__()
        self.activation = ("gelu", "tanh") if gelu else ("none", "")
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        name, formula = self.activation
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], formula)


class RoundedLinear(nn.Module):
    """A linear map whose numbers are rounded once to what autocast would round them to for every
    token; for inference under it only."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """`weight` is (out, in)."""
        super().__init__()
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@torch.no_grad()
def pack(model: GPT2LMModel, precision: str = "fp32") -> GPT2LMModel:
    """Merge the adapter and prepare all weights for fast decoding in a precision, fp32, bf16 or
    fp16; return the model itself, which gives the same outputs.

    From then on it can only be run: there is nothing left to train, save or load into. A layer that
    is merged already is not merged again. In halves weights are rounded once. In fp32 they are laid
    out for oneDNN, and where that is not there, as on a GPU, the model is merged and that is all.
    """
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, loralib.Linear)]
    for _, layer in linears:
        if not layer.merged:
            layer.merge()
    embedding = model.transformer.wte.weight
    fits = embedding.device.type == "cpu" and embedding.dtype == torch.float32
    if precision == "fp32" and not (fits and torch.backends.mkldnn.is_available()):
        return model

    def linear(weight: Tensor, bias: Tensor | None, gelu: bool = False) -> nn.Module:
        if precision == "fp32":
            return PackedLinear(weight, bias, gelu)
        return RoundedLinear(weight, bias, gpu.AUTOCAST[precision])

    for name, layer in linears:
        weight, _ = layer.serving_weight()
        gelu = precision == "fp32" and name.endswith("mlp.c_fc")
        rows = weight.T if layer.fan_in_fan_out else weight
        model.set_submodule(name, linear(rows, layer.bias, gelu))
        if gelu:
            model.set_submodule(name.replace("c_fc", "gelu"), nn.Identity())
    model.packed_head = linear(model.head_weight, None)
    return model


@contextmanager
def lent_to_decoding(model: GPT2LMModel, precision: str) -> Iterator[GPT2LMModel]:
    """Within the block a model that is being trained decodes as one that was loaded to decode: in
    eval mode and packed. After it every module and tensor is the one it was."""
    replaced = loralib.LoRALayer, nn.GELU
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, replaced)]
    layers = [module for _, module in modules if isinstance(module, loralib.LoRALayer)]
    was_training = model.training
    try:
        yield pack(model.eval(), precision)
    finally:
        model.packed_head = None
        for name, module in modules:
            model.set_submodule(name, module)
        for layer in layers:
            layer.unmerge()
        model.train(was_training)
