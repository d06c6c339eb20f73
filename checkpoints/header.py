"""What an adapter file says of itself: `AdapterHeader`, and the JSON that it is written as.

One spelling for every writer and reader: training, PEFT import and the converters fill a header,
and `from_json` makes every check, so that whoever holds a header holds a sound one.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from tokenizers import Tokenizer

from common.errors import InputError
from data_utils import vocabulary_fingerprint
from loralib import KINDS, LoraConfig
from methods import ADDITIONS, BOTTLENECKS, BottleneckConfig, PrefixConfig
from model import LORA_TARGETS

FORMAT_VERSION = 1
WITHOUT_ADAPTER = ("full", "top", "bias", "top2")  # what training may change without an adapter
LARGEST_RANK = 2**16  # of LoRA, and the largest width of a bottleneck
LARGEST_PREFIX = 2**16
LARGEST_ALPHA = 1e9
LARGEST_INTEGER = 2**63 - 1
REQUIRED: Any = object()


@dataclass(frozen=True)
class Base:
    """The base weights that an adapter belongs to; no fingerprint where it is not known."""

    name: str | None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Vocabulary:
    """Size and fingerprint of the vocabulary that the texts were encoded with."""

    size: int
    sha256: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """Return what a header says of this vocabulary."""
        return cls(tokenizer.get_vocab_size(), vocabulary_fingerprint(tokenizer))

    def is_of(self, tokenizer: Tokenizer) -> bool:
        """Whether it is this vocabulary; an older fingerprint, of the entries alone, counts."""
        known = (vocabulary_fingerprint(tokenizer, merges) for merges in (True, False))
        return self.sha256 in known


@dataclass(frozen=True)
class AdapterHeader:
    """Settings and origin of what an adapter file holds; no path, no time.

    `lora`, `bottleneck` or `prefix` are the adapter's settings, all None where `method` is one of
    WITHOUT_ADAPTER; `method` is "lora" for every kind of it, else the kind. `model_card` is None
    only for an adapter that PEFT wrote; `seed`, `train_data` (the data's sha256) and `settings`
    (whatever else decides the result) are None for one that was not trained here.
    """

    lora: LoraConfig | None
    base: Base
    method: str = "lora"
    model_card: str | None = None
    vocabulary: Vocabulary | None = None
    step: int = 0
    seed: int | None = None
    train_data: str | None = None
    settings: Mapping[str, Any] | None = field(default=None, hash=False)
    bottleneck: BottleneckConfig | None = None
    prefix: PrefixConfig | None = None

    @property
    def kind(self) -> str:
        """The kind of LoRA, or the method that takes its place."""
        return self.lora.kind if self.lora else self.method

    @property
    def virtual_tokens(self) -> int:
        """How many positions a prefix takes from the texts."""
        return self.prefix.length if self.prefix else 0

    def to_fields(self) -> dict[str, Any]:
        """The header as plain values, under the names that files use."""
        fields: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "model_card": self.model_card,
            "vocabulary": self.vocabulary and vars(self.vocabulary).copy(),
            "base": vars(self.base).copy(),
            "step": self.step,
        }
        if self.lora:
            fields |= {"r": self.lora.r, "alpha": self.lora.alpha, "dropout": self.lora.dropout}
            fields |= {"rslora": self.lora.rslora, "targets": list(self.lora.targets)}
        elif self.bottleneck:
            fields |= asdict(self.bottleneck)
        elif self.prefix:
            fields |= {"prefix_length": self.prefix.length}
        else:  # files of this format say what the flags were even where they had no effect
            flags = self.settings or {}
            fields |= {"r": 0, "targets": [], "rslora": flags.get("use_rslora", False)}
            fields |= {"alpha": flags.get("lora_alpha", 1.0)}
            fields |= {"dropout": flags.get("lora_dropout", 0.0)}
        trained = {"seed": self.seed, "train_data": self.train_data, "settings": self.settings}
        return fields | {name: value for name, value in trained.items() if value is not None}

    def to_json(self) -> str:
        """The header as files hold it, with sorted keys."""
        return json.dumps(self.to_fields(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | None, source: str) -> "AdapterHeader":
        """The header that `text` holds; `source`, a flag and a file, begins every error.

        Raises:
            InputError: there is no header, it is of another format, or it names the bad field.
        """
        try:
            fields = json.loads(text or "")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source} has no adapter header; was it made here?") from error
        return cls.from_fields(fields, source)

    @classmethod
    def from_fields(cls, fields: object, source: str) -> "AdapterHeader":
        """As `from_json`, for values that are parsed already."""
        read = _Reader(fields, source)
        version = read.integer("format", 0)
        if version != FORMAT_VERSION:
            raise InputError(f"{source} has format {version}, this program reads {FORMAT_VERSION}")
        model_card, kind = read.text("model_card"), read.text("kind")
        bottleneck = _bottleneck_config(read) if kind in BOTTLENECKS else None
        prefix = None
        if kind == "prefix":
            prefix = PrefixConfig(read.integer("prefix_length", 1, LARGEST_PREFIX))
        config = None if bottleneck or prefix else _lora_config(read)
        base, vocabulary = read.inner("base"), read.inner("vocabulary", None)
        return cls(
            lora=config,
            base=Base(base.text("name", None), base.text("fingerprint", None)),
            method="lora" if config else kind,
            model_card=model_card,
            vocabulary=vocabulary
            and Vocabulary(vocabulary.integer("size", 1), vocabulary.text("sha256")),
            step=read.integer("step", 0, default=0),
            seed=read.integer("seed", 0, default=None),
            train_data=read.text("train_data", None),
            settings=read.settings(),
            bottleneck=bottleneck,
            prefix=prefix,
        )


def _lora_config(read: "_Reader") -> LoraConfig | None:
    kind, kinds = read.text("kind"), (*KINDS, *ADDITIONS, *WITHOUT_ADAPTER)
    r = read.integer("r", 0, LARGEST_RANK)
    alpha = read.number("alpha", LARGEST_ALPHA)
    dropout, rslora = read.number("dropout", 1.0, 0.0), read.flag("rslora")
    targets = read.names("targets")
    if kind not in kinds:
        read.refuse("kind", f"kind {kind!r:.40} is none of {', '.join(kinds)}")
    if unknown := [target for target in targets if target not in LORA_TARGETS]:
        read.refuse("targets", f"target {unknown[0]!r:.40} is none of {', '.join(LORA_TARGETS)}")
    if kind in WITHOUT_ADAPTER:
        return None
    try:
        return LoraConfig(r, alpha, dropout, targets, kind, rslora)
    except ValueError as error:
        read.refuse("settings of an adapter", str(error))


def _bottleneck_config(read: "_Reader") -> BottleneckConfig:
    return BottleneckConfig(read.integer("dim", 1, LARGEST_RANK), read.text("kind"))


class _Reader:
    """The fields of a JSON object by type and range; what is amiss is an InputError naming it.

    A field may be absent or null only where its method is given a default.
    """

    def __init__(self, fields: object, source: str, owner: str = "") -> None:
        self.fields = fields if isinstance(fields, dict) else {}
        self.source, self.owner = source, owner

    def refuse(self, name: str, reason: str) -> NoReturn:
        raise InputError(
            f"{self.source} has no good {self.owner}{name} in its header ({reason}); was it made "
            "here?"
        )

    def value(self, name: str, types: type | tuple[type, ...], default: Any) -> Any:
        value = self.fields.get(name)
        if value is None and default is not REQUIRED:
            return default
        bool_for_number = isinstance(value, bool) and types is not bool
        if not isinstance(value, types) or bool_for_number:
            self.refuse(name, f"found {value!r:.40}")
        return value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        return self.value(name, str, default)

    def flag(self, name: str) -> bool:
        return self.value(name, bool, False)

    def integer(
        self, name: str, least: int, most: int = LARGEST_INTEGER, default: Any = REQUIRED
    ) -> Any:
        value = self.value(name, int, default)
        if value is not default and not least <= value <= most:
            self.refuse(name, f"it must be from {least} to {most}")
        return value

    def number(self, name: str, most: float, default: Any = REQUIRED) -> Any:
        """A number from 0 to `most`, kept as it is written, 8 or 8.0."""
        value = self.value(name, (int, float), default)
        if not 0 <= value <= most:
            self.refuse(name, f"it must be from 0 to {most:g}")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        values = self.value(name, list, REQUIRED)
        if not all(isinstance(value, str) for value in values):
            self.refuse(name, f"found {values!r:.40}")
        return tuple(values)

    def inner(self, name: str, default: Any = REQUIRED) -> Any:
        """The object in a field, to be read in turn."""
        value = self.value(name, dict, default)
        return value if value is default else _Reader(value, self.source, f"{name} ")

    def settings(self) -> dict[str, Any] | None:
        """Names with plain values, finite and bounded."""
        values = self.value("settings", dict, None)
        for name, value in (values or {}).items():
            if not (
                (isinstance(value, int) and abs(value) <= LARGEST_INTEGER)
                or (isinstance(value, float) and math.isfinite(value))
                or isinstance(value, str | None)
            ):
                self.refuse("settings", f"{name!r:.40} is {value!r:.40}")
        return values
