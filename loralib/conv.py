"""Convolutions with a frozen kernel and a trained low-rank update of it."""

import math
from typing import Any

from torch import Tensor, nn

from .layers import LoRALayer


class _ConvLoRA(LoRALayer, nn.modules.conv._ConvNd):
    """A convolution and one with delta for its kernel: (B, in, *grid) → (B, out, *grid).

    With k the kernel's last side, A is (r · k, in · k) and B (out / groups · other sides, r · k):
    BA has as many numbers as W0, whatever the kernel and the groups, and takes its shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        # What follows in the order of classes is Conv1d to Conv3d, which take a number for a side.
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)  # type: ignore[arg-type]
        *sides, k = self.kernel_size
        inputs, part = in_channels * k, out_channels // self.groups * math.prod(sides)
        limit = self.weight.numel() // (k * (inputs + part))
        sizes = {"inputs": inputs, "part": part, "limit": limit, "k": k}
        self._add_adapter(r, lora_alpha, lora_dropout, merge_weights, use_rslora, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x with W0, and of dropout(x) with scaling · BA."""
        weight, complete = self.serving_weight()
        h = self._conv_forward(x, weight, self.bias)
        return h if complete else self.adapt(h, x)

    def add_update(self, h: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        kernel = self.delta_weight(a, b)
        return h + self._conv_forward(x.to(kernel.dtype), kernel, None).to(h.dtype)

    def delta_weight(self, a: Tensor, b: Tensor) -> Tensor:
        return self.scaling * (b @ a).view(self.base_weight.shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):  # loralib 0.1.2 kept the convolution in a child, `conv`
            if f"{prefix}conv.{name}" in state_dict:
                state_dict[prefix + name] = state_dict.pop(f"{prefix}conv.{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Conv1d(_ConvLoRA, nn.Conv1d):
    """nn.Conv1d and an adapter."""


class Conv2d(_ConvLoRA, nn.Conv2d):
    """nn.Conv2d and an adapter."""


class Conv3d(_ConvLoRA, nn.Conv3d):
    """nn.Conv3d and an adapter."""
