"""What can be compared: methods by the names and settings that the command line gives them.

    lora:r=4   lora:r=16,targets=all,alpha=32   full   top2   bitfit   dora:r=4,lr=1e-3/5e-3

A method is a kind and its settings; those left out have the defaults of gpt2_ft.py. `lr` may name
learning rates of the method's own, between which the shortest runs decide.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from common.errors import InputError


class Option(NamedTuple):
    """A setting of a method: the flag it becomes, its default, and the type of its values."""

    flag: str
    default: str
    type: type


class Kind(NamedTuple):
    """A kind of method: its name in tables, the flags that choose it, and its settings; the first
    of these, if there is one, is always part of a run's name."""

    title: str
    flags: tuple[str, ...]
    options: Mapping[str, Option]


LORA = {
    "r": Option("lora_dim", "4", int),
    "targets": Option("lora_targets", "q,v", str),
    "alpha": Option("lora_alpha", "32", float),
    "dropout": Option("lora_dropout", "0.1", float),
}
KINDS = {
    "lora": Kind("LoRA", (), LORA),
    "rslora": Kind("rsLoRA", ("--use_rslora",), LORA),
    "lora_plus": Kind("LoRA+", (), LORA | {"ratio": Option("lora_plus_ratio", "16", float)}),
    "dora": Kind("DoRA", ("--lora_kind=dora",), LORA),
    "pissa": Kind("PiSSA", ("--lora_kind=pissa",), LORA),
    "lora_fa": Kind("LoRA-FA", ("--lora_kind=lora_fa",), LORA),
    "adapter_l": Kind(
        "AdapterL", ("--method=adapter_l",), {"dim": Option("adapter_dim", "6", int)}
    ),
    "adapter_h": Kind(
        "AdapterH", ("--method=adapter_h",), {"dim": Option("adapter_dim", "112", int)}
    ),
    "prefix": Kind(
        "prefix",
        ("--method=prefix",),
        {
            "length": Option("prefix_length", "5", int),
            "hidden": Option("prefix_hidden", "512", int),
        },
    ),
    "full": Kind("full fine-tuning", ("--method=full",), {}),
    "top2": Kind("FT-Top2", ("--method=top2",), {}),
    "bitfit": Kind("BitFit", ("--method=bitfit",), {}),
}


@dataclass(frozen=True)
class Method:
    """A kind with the value of each of its settings, and learning rates of its own, if any."""

    kind: str
    settings: tuple[tuple[str, str], ...] = ()
    rates: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Method":
        """Return the method that `KIND[:SETTING=VALUE,...]` names.

        Raises:
            InputError: there is no such kind or setting, or a value is not of its type.
        """
        name, _, given = text.partition(":")
        if name not in KINDS:
            raise InputError(f"--methods {text}: {name!r} is none of {', '.join(KINDS)}")
        options = KINDS[name].options
        values = {setting: option.default for setting, option in options.items()}
        rates: tuple[float, ...] = ()
        # A value may hold commas, as targets=q,v does.
        for pair in filter(None, re.split(r",(?=\w+=)", given)):
            setting, _, value = pair.partition("=")
            if setting == "lr":
                given_rates = [float(_number(text, rate, float)) for rate in value.split("/")]
                rates = checked_rates(given_rates, f"--methods {text}: lr")
            elif setting not in options:
                known = ", ".join([*options, "lr"])
                raise InputError(f"--methods {text}: {setting!r} is no setting of {name}: {known}")
            else:
                number = _number(text, value, options[setting].type)
                values[setting] = _shortest(number)
        return cls(name, tuple(values.items()), rates)

    @property
    def name(self) -> str:
        """The part of a run's name that says the method: `lora-r4-all`."""
        parts = [self.kind]
        for place, (setting, value) in enumerate(self.settings):
            if place == 0 or value != KINDS[self.kind].options[setting].default:
                is_layers = setting == "targets"
                # Letters alone, as it names a file: what they are the trainer checks.
                parts.append(re.sub(r"\W", "", value) if is_layers else f"{setting}{value}")
        return "-".join(parts)

    @property
    def title(self) -> str:
        """The method as tables name it: `LoRA, r 4, all`."""
        parts = [KINDS[self.kind].title]
        for place, (setting, value) in enumerate(self.settings):
            if place == 0 or value != KINDS[self.kind].options[setting].default:
                parts.append(value if setting == "targets" else f"{setting} {value}")
        return ", ".join(parts)

    @property
    def flags(self) -> list[str]:
        """The flags of gpt2_ft.py that choose it."""
        kind = KINDS[self.kind]
        options = [f"--{kind.options[name].flag}={value}" for name, value in self.settings]
        return [*kind.flags, *options]

    def describe(self) -> dict[str, str]:
        """Return kind and settings by name, as a result's `settings` keep them."""
        return {"kind": self.kind, **dict(self.settings)}


def checked_rates(rates: Iterable[float], source: str) -> tuple[float, ...]:
    """Return the learning rates, each once; raise InputError, which `source` begins, for one that
    trains nothing."""
    distinct = tuple(dict.fromkeys(rates))
    if wrong := [rate for rate in distinct if not 0 < rate < math.inf]:
        raise InputError(f"{source} {wrong[0]:g} must be above 0 and finite")
    return distinct


def _shortest(value: int | float | str) -> str:
    """The shortest text that is read as this value again: 8 for 8.0."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def _number(text: str, value: str, kind: type) -> int | float | str:
    """Return the value as its type has it; the text is for the message."""
    try:
        return kind(value)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"--methods {text}: {value!r} is not {what}") from error


def parse_methods(texts: list[str]) -> list[Method]:
    """Return the methods; raise InputError for two of one name, whose results would be one file."""
    methods = [Method.parse(text) for text in texts]
    names = [method.name for method in methods]
    if double := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"--methods names {double[0]} twice; several learning rates of one method are "
            f"{double[0].split('-')[0]}:lr=1e-3/5e-3"
        )
    return methods
