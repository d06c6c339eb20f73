"""Files and formats: base weights, adapters, and the formats they are read from and written to."""

from checkpoints.adapter import (
    PEFT_FILES,
    apply_trained,
    load,
    load_adapters,
    merge,
    newest_adapter,
    parse_targets,
    read_adapter,
    save_adapter,
)
from checkpoints.base import (
    BaseWeights,
    base_fingerprint,
    card_of,
    load_base,
    load_weights,
    model_config,
    read_base,
    read_tensors,
)
from checkpoints.header import FORMAT_VERSION, AdapterHeader, Base, Vocabulary

__all__ = ["FORMAT_VERSION", "PEFT_FILES", "AdapterHeader", "Base", "BaseWeights", "Vocabulary"]
__all__ += ["apply_trained", "base_fingerprint", "card_of", "load", "load_adapters"]
__all__ += ["load_base", "load_weights", "merge", "model_config"]
__all__ += ["newest_adapter", "parse_targets", "read_adapter", "read_base", "read_tensors"]
__all__ += ["save_adapter"]
