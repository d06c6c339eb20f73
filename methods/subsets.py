"""Which parameters of a model are trained: those that a method adds, or a part of the base's own.

full      all weights
top       the last blocks; top2, as Li and Liang 2021 (arXiv:2101.00190, section 5.2) fine-tune,
          the last two and the LayerNorm after them
bias      all biases, those of LayerNorms too (BitFit; Ben Zaken et al. 2022, arXiv:2106.10199)
"""

from torch import nn

# Parts of the names that tensors of adapters have and tensors of the base have not.
ADDED = ("lora_", "_adapter.", ".prefix.")


def is_added(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter, of whatever method, not to the base."""
    return any(part in name for part in ADDED)


def train_only(model: nn.Module, *parts: nn.Module) -> None:
    """Train these parts of a model and freeze all the rest."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_()


def train_added(model: nn.Module) -> None:
    """Train what a method adds to the base, and freeze the base."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_added(name)
