"""Low-rank adaptation of torch layers; needs torch alone.

layer = loralib.Linear(768, 768, r=4, lora_alpha=32)       # a layer, or
loralib.inject(model, targets=["fc1"], r=4, lora_alpha=8)  # adapters in any model
loralib.mark_only_lora_as_trainable(model)
torch.save(loralib.lora_state_dict(model), "adapter.pt")
"""

from .combine import adapters_by_row, merge_adapters
from .config import KINDS, LoraConfig
from .inject import eject, inject
from .layers import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoRALayer, MergedLinear
from .utils import lora_state_dict, mark_only_lora_as_trainable, start_from_base

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoRALayer", "MergedLinear"]
__all__ += [
    "KINDS",
    "LoraConfig",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "start_from_base",
]
__all__ += ["adapters_by_row", "eject", "inject", "merge_adapters"]
