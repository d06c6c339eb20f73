"""Low-rank adaptation of torch layers; needs torch alone.

layer = loralib.Linear(768, 768, r=4, lora_alpha=32)
loralib.mark_only_lora_as_trainable(model)
torch.save(loralib.lora_state_dict(model), "adapter.pt")
"""

from .layers import KINDS, Conv1d, Conv2d, Conv3d, Embedding, Linear, LoRALayer, MergedLinear
from .utils import lora_state_dict, mark_only_lora_as_trainable, start_from_base

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoRALayer", "MergedLinear"]
__all__ += ["KINDS", "lora_state_dict", "mark_only_lora_as_trainable", "start_from_base"]
