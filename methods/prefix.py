"""Prefix tuning: every layer attends to keys and values of n virtual tokens before the text.

Li & Liang 2021 (arXiv:2101.00190, section 4). The base is frozen, and layer l computes

    softmax(q [P_k; K]ᵀ / √D) [P_v; V]      P_k = P[:, l, 0] and P_v = P[:, l, 1], (n, C) each
    P = tanh(E W1 + b1) W2 + b2             E (n, C), W1 (C, h), W2 (h, 2·L·C)

of which E, W1, b1, W2 and b2, the generator, are trained: training P itself is less stable and ends
worse (section 4.3). After training the generator has done its part; P alone is saved. The text's
positions start at n. A prefix is no change of any weight: it cannot be merged.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.batch import Spans

PARTS = 2  # keys and values
KEY_VALUES = "transformer.prefix.key_values"  # the name of P in a model without generator


@dataclass(frozen=True)
class PrefixConfig:
    """What a prefix is, apart from its numbers: its length n, and the width h of its generator, 0
    where there is none and P itself is the parameter.

    Raises:
        ValueError: a setting makes no sense; the message has its value.
    """

    length: int
    hidden: int = 0

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("hidden", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"a prefix needs a whole {name} from {least} up, got {value!r:.40}"
                )


class Prefix(nn.Module):
    """Keys and values of the virtual tokens of every layer."""

    def __init__(self, config: PrefixConfig, n_layer: int, n_embd: int) -> None:
        super().__init__()
        self.length = config.length
        self.shape = config.length, n_layer, PARTS, n_embd
        if config.hidden:
            self.embedding = nn.Parameter(torch.empty(config.length, n_embd))
            self.generator = nn.Sequential(
                nn.Linear(n_embd, config.hidden),
                nn.Tanh(),
                nn.Linear(config.hidden, n_layer * PARTS * n_embd),
            )
        else:
            self.key_values = nn.Parameter(torch.empty(self.shape))
        self.start()

    @property
    def count(self) -> int:
        """How many numbers P has, 2·L·C·n."""
        return math.prod(self.shape)

    def start(self) -> None:
        """Draw all values as PyTorch draws those of new embeddings and linear layers."""
        if not hasattr(self, "generator"):
            nn.init.normal_(self.key_values)
            return
        nn.init.normal_(self.embedding)
        for layer in self.generator:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def numbers(self) -> Tensor:
        """P (n, L, 2, C), always in fp32, so that training sees the numbers that are saved."""
        if not hasattr(self, "generator"):
            return self.key_values
        with torch.autocast(self.embedding.device.type, enabled=False):
            return self.generator(self.embedding).view(self.shape)

    def forward(self) -> tuple[Tensor, ...]:
        """For each layer the rows of the virtual tokens, (n, 3C): queries, which nobody asks for
        and so are zero, keys and values."""
        rows = self.numbers().permute(1, 0, 2, 3).flatten(2)  # (L, n, 2C)
        return F.pad(rows, (rows.size(-1) // PARTS, 0)).unbind()


def prepend(rows: Tensor, packed: Tensor, spans: Spans) -> Tensor:
    """The sequences that lie in packed (N, X), each with these rows (n, X) before it."""
    rows = rows.to(packed.dtype)
    return torch.cat([part for own in packed.split(spans.lengths) for part in (rows, own)])


def drop_first(count: int, packed: Tensor, spans: Spans) -> Tensor:
    """The sequences that lie in packed (N, X), each without its first rows."""
    return torch.cat([own[count:] for own in packed.split(spans.lengths)])
