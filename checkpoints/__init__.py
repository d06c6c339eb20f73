"""Files and formats: base weights, adapters, and the formats they are read from and written to."""

from checkpoints.adapter import (
    PEFT_FILES,
    FoundAdapter,
    apply_trained,
    assemble,
    check_vocabulary,
    find_adapter,
    load,
    load_adapters,
    merge,
    parse_targets,
    read_adapter,
    run_flags,
    save_adapter,
    share_weights,
)
from checkpoints.base import (
    BaseWeights,
    base_fingerprint,
    card_of,
    check_window,
    load_base,
    load_weights,
    model_config,
    read_base,
    read_shapes,
    read_tensors,
)
from checkpoints.header import FORMAT_VERSION, AdapterHeader, Base, Vocabulary

__all__ = ["FORMAT_VERSION", "PEFT_FILES", "AdapterHeader", "Base", "BaseWeights", "FoundAdapter"]
__all__ += ["Vocabulary", "apply_trained", "assemble", "base_fingerprint", "card_of"]
__all__ += ["check_vocabulary", "check_window", "find_adapter", "load", "load_adapters"]
__all__ += ["load_base", "load_weights", "merge", "model_config", "parse_targets", "read_adapter"]
__all__ += [
    "read_base",
    "read_shapes",
    "read_tensors",
    "run_flags",
    "save_adapter",
    "share_weights",
]
