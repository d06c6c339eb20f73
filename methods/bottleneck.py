"""Bottleneck adapters: small networks that are put into the blocks of a frozen model.

    AdapterL    x + up(relu(down(LN(x))))    once a block, after it
    AdapterH    h + up(gelu(down(h)))        twice a block, on the outputs of attention and MLP,
                                             before they are added to the residual stream

AdapterL is of Lin et al. 2020 (arXiv:2004.03829, section 3), AdapterH of Houlsby et al. 2019
(arXiv:1902.00751, section 2.1 and figure 2), which leaves the nonlinearity open; it is the one of
GPT-2 here. down is C to `dim` numbers, up the way back, both with biases. Because of what stands
between them a bottleneck is no change of any weight: it cannot be merged.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

BOTTLENECKS = ("adapter_l", "adapter_h")
PLACES = {"adapter_l": ("block",), "adapter_h": ("attn", "mlp")}
HOULSBY_STD = 1e-2  # section 3.6: a normal distribution, truncated at two standard deviations


@dataclass(frozen=True)
class BottleneckConfig:
    """What a bottleneck adapter is, apart from its tensors: one of BOTTLENECKS, and its width.

    Raises:
        ValueError: a setting makes no sense; the message has its value.
    """

    dim: int
    kind: str = "adapter_l"

    def __post_init__(self) -> None:
        if self.kind not in BOTTLENECKS:
            raise ValueError(f"kind must be one of {', '.join(BOTTLENECKS)}, not {self.kind!r}")
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 1:
            raise ValueError(f"a bottleneck needs a whole dim above 0, got {self.dim!r:.40}")


class Bottleneck(nn.Module):
    """One bottleneck adapter, (..., C) to (..., C); AdapterL alone has a LayerNorm of its own."""

    def __init__(self, config: BottleneckConfig, width: int, epsilon: float) -> None:
        super().__init__()
        self.kind = config.kind
        if self.kind == "adapter_l":
            self.ln = nn.LayerNorm(width, eps=epsilon)
        self.down = nn.Linear(width, config.dim)
        self.up = nn.Linear(config.dim, width)

    def start_near_identity(self) -> None:
        """Let AdapterL be the identity, its `up` zero, and AdapterH near it, as in section 3.6."""
        if self.kind == "adapter_l":
            nn.init.zeros_(self.up.weight)
        else:
            for layer in (self.down, self.up):
                bound = 2 * HOULSBY_STD
                nn.init.trunc_normal_(layer.weight, std=HOULSBY_STD, a=-bound, b=bound)

    def forward(self, x: Tensor) -> Tensor:
        """x + up(relu(down(LN(x)))), or for AdapterH x + up(gelu(down(x)))"""
        if self.kind == "adapter_l":
            return x + self.up(F.relu(self.down(self.ln(x))))
        return x + self.up(F.gelu(self.down(x), approximate="tanh"))

    def adapt(self, h: Tensor, x: Tensor) -> Tensor:
        """The output for x; h, that of the base, which has nothing in this place, is x itself."""
        return self(x)


def bottleneck(
    place: str, config: BottleneckConfig | None, width: int, epsilon: float
) -> nn.Module:
    """What stands at a place of a block, "attn", "mlp" or "block": a bottleneck where its kind has
    one there, and nothing, which changes nothing, elsewhere."""
    if config is None or place not in PLACES[config.kind]:
        return nn.Identity()
    return Bottleneck(config, width, epsilon)
