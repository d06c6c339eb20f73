"""Files and formats: base weights, adapters, and the formats they are read from and written to."""

from checkpoints.adapter import (
    FORMAT_VERSION,
    PEFT_FILES,
    apply_trained,
    load_adapters,
    load_for_decoding,
    load_with_adapter,
    merge,
    newest_adapter,
    parse_targets,
    read_adapter,
    save_adapter,
)
from checkpoints.base import (
    base_fingerprint,
    card_of,
    load_base,
    load_weights,
    model_config,
    read_base,
    read_tensors,
)

__all__ = ["FORMAT_VERSION", "PEFT_FILES", "apply_trained", "base_fingerprint", "card_of"]
__all__ += ["load_adapters", "load_base", "load_for_decoding", "load_weights", "load_with_adapter"]
__all__ += ["merge", "model_config", "newest_adapter", "parse_targets", "read_adapter"]
__all__ += ["read_base", "read_tensors", "save_adapter"]
