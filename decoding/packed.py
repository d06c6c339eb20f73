"""A model's weights laid out once for fast decoding on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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


@torch.no_grad()
def pack(model: GPT2LMModel) -> GPT2LMModel:
    """Merge the adapter and lay all weights out for fast decoding; return the model itself.

    From then on it can only be run: there is nothing left to train, save or load into. A layer that
    is merged already is not merged again. Where there is no oneDNN for it (GPU, other precisions)
    the model is merged and that is all.
    """
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, loralib.Linear)]
    for _, layer in linears:
        if not layer.merged:
            layer.merge()
    embedding = model.transformer.wte.weight
    fits = embedding.device.type == "cpu" and embedding.dtype == torch.float32
    if fits and torch.backends.mkldnn.is_available():
        for name, layer in linears:
            weight, _ = layer.serving_weight()
            rows = weight.T if layer.fan_in_fan_out else weight
            gelu = name.endswith("mlp.c_fc")
            model.set_submodule(name, PackedLinear(rows, layer.bias, gelu))
            if gelu:
                model.set_submodule(name.replace("c_fc", "gelu"), nn.Identity())
        model.packed_head = PackedLinear(model.head_weight, None)
    return model


@contextmanager
def lent_to_decoding(model: GPT2LMModel, precision: str) -> Iterator[GPT2LMModel]:
    """Within the block a model that is being trained decodes as one that was loaded to decode: in
    eval mode, merged and, in fp32, packed. After it every module and tensor is the one it was."""
    replaced = loralib.LoRALayer, nn.GELU
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, replaced)]
    layers = [module for _, module in modules if isinstance(module, loralib.LoRALayer)]
    was_training = model.training
    try:
        model.eval()
        if precision == "fp32":
            pack(model)
        else:
            for layer in layers:
                layer.merge()
        yield model
    finally:
        model.packed_head = None
        for name, module in modules:
            model.set_submodule(name, module)
        for layer in layers:
            layer.unmerge()
        model.train(was_training)
