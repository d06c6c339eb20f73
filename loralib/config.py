"""The settings of an adapter, under one name each from the command line to the file's header."""

import math
import sys
from dataclasses import dataclass
from typing import Any

from .kinds import KINDS


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is, apart from its tensors: W0 x + scaling · B A dropout(x).

    `r` is the rank and `dropout` acts on the adapter's input. `targets` names the adapted layers in
    the words of the model (GPT-2's are the keys of `model.LORA_TARGETS`); the default is the LoRA
    paper's choice, query and value. `kind` is one of KINDS, and `rslora` makes the scaling
    alpha / √r (Kalajdzievski 2023, arXiv:2312.03732). No adapter is None, not a rank of 0.

    Raises:
        ValueError: a setting makes no sense; the message has its value.
    """

    r: int = 4
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")
    kind: str = "lora"
    rslora: bool = False

    def __post_init__(self) -> None:
        check_numbers(self.r, self.alpha, self.dropout)
        if self.r == 0:
            raise ValueError("an adapter needs a rank r above 0, got r=0")
        listed = isinstance(self.targets, tuple | list)
        if not listed or not all(isinstance(target, str) for target in self.targets):
            raise ValueError(f"targets must be a sequence of names, got {self.targets!r}")
        object.__setattr__(self, "targets", tuple(self.targets))  # a list, where it was JSON
        if len(set(self.targets)) < max(len(self.targets), 1):
            raise ValueError(f"targets must be distinct and at least one, got {self.targets}")
        check_kind(self.kind)

    @property
    def scaling(self) -> float:
        """The factor of BA: alpha / r, with `rslora` alpha / √r."""
        return scaling(self.r, self.alpha, self.rslora)

    def layer_settings(self) -> dict[str, Any]:
        """The settings of a Linear or MergedLinear, by the names that its constructor has from
        PyPI's loralib."""
        return {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "kind": self.kind,
        }


def scaling(r: int, alpha: float, rslora: bool) -> float:
    """alpha / r, or alpha / √r; 0 for a rank of 0, which has no adapter."""
    return alpha / (math.sqrt(r) if rslora else r) if r else 0.0


def check_numbers(r: int, alpha: float, dropout: float) -> None:
    """Raise ValueError, with the values, unless they are a rank, an alpha and a dropout rate."""
    good_rank = isinstance(r, int) and not isinstance(r, bool) and r >= 0
    good_alpha = isinstance(alpha, int | float) and 0 < alpha <= sys.float_info.max
    if not (good_rank and good_alpha and isinstance(dropout, int | float) and 0 <= dropout < 1):
        need = "an integer r >= 0, a finite lora_alpha > 0 and 0 <= lora_dropout < 1"
        raise ValueError(
            f"need {need}, got r={r!r:.40}, lora_alpha={alpha!r:.40}, lora_dropout={dropout!r:.40}"
        )


def check_kind(kind: str) -> None:
    """Raise ValueError unless `kind` is one of KINDS."""
    if kind not in list(KINDS):  # which compares what has no hash, too
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
