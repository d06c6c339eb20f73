"""Low-rank adaptation of torch layers; needs torch alone.

layer = loralib.Linear(768, 768, r=4, lora_alpha=32)       # a layer, or
loralib.inject(model, targets=["fc1"], r=4, lora_alpha=8)  # adapters in any model
loralib.mark_only_lora_as_trainable(model)
torch.save(loralib.lora_state_dict(model), "adapter.pt")
"""

from .combine import adapters_by_row, merge_adapters
from .config import LoraConfig
from .conv import Conv1d, Conv2d, Conv3d
from .inject import inject, remove_adapters
from .kinds import KINDS
from .layers import Embedding, Linear, LoRALayer, MergedLinear
from .utils import (
    lora_state_dict,
    mark_only_lora_as_trainable,
    merged_state_dict,
    start_from_base,
)

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "KINDS", "Linear", "LoRALayer", "LoraConfig"]
__all__ += ["MergedLinear", "adapters_by_row", "inject", "lora_state_dict"]
__all__ += ["mark_only_lora_as_trainable", "merge_adapters", "merged_state_dict"]
__all__ += ["remove_adapters", "start_from_base"]
