"""Which columns of a data file are the two sides of a row: by their names, or by `--fields`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.errors import InputError


@dataclass(frozen=True)
class Fields:
    """The columns of a row: those of the context, which a newline joins and of which all but the
    first may be empty, and that of the completion, None where it is not known."""

    context: tuple[str, ...]
    completion: str | None

    @property
    def columns(self) -> set[str]:
        return {*self.context, *filter(None, [self.completion])}

    def __str__(self) -> str:
        completion = "" if self.completion is None else f" -> {self.completion}"
        return f"{' + '.join(self.context)}{completion}"


OWN = Fields(("context",), "completion")
KNOWN = (
    OWN,
    Fields(("prompt",), "completion"),
    Fields(("prompt",), "response"),
    Fields(("instruction", "input"), "output"),
    Fields(("input",), "output"),
    Fields(("input",), "target"),
    Fields(("source",), "target"),
    Fields(("question",), "answer"),
    Fields(("mr",), "ref"),
)
COMPLETIONS = {fields.completion for fields in KNOWN if fields.completion}
SIDES = COMPLETIONS | {name for fields in KNOWN for name in fields.context}


def add_fields_flag(add: Callable[..., object]) -> None:
    """Add `--fields` by a parser's `add_argument`; what it holds goes to `parse_fields`."""
    add(
        "--fields",
        metavar="CONTEXT:COMPLETION",
        help="columns of the data (default: the usual names, docs/data.md); a + joins two of them",
    )


def parse_fields(text: str) -> Fields:
    """The columns that `--fields` names: CONTEXT:COMPLETION, or CONTEXT alone for decoding.

    Raises:
        InputError: a name is empty, or there are too many.
    """
    context, colon, completion = text.partition(":")
    names = tuple(name.strip() for name in context.split("+"))
    completion = completion.strip()
    if not all(names) or (colon and not completion) or ":" in completion:
        raise InputError(f"--fields {text!r} is not CONTEXT:COMPLETION, the names of two columns")
    return Fields(names, completion or None)


def sides(names: Iterable[str]) -> dict[str, str]:
    """Known names of sides → the columns that have them, whatever their case and blanks around.

    `source` is a side only if there is a `target`: alone it says where a row comes from.

    Raises:
        ValueError: two columns have one name.
    """
    found: dict[str, str] = {}
    for name in names:
        key = name.strip().lower()
        if key in SIDES:
            if key in found:
                raise ValueError(f"{key!r} is the name of two columns")
            found[key] = name
    return found


def recognise(names: Iterable[str], need_completion: bool = True) -> Fields:
    """The columns that hold the two sides of a row.

    They are `context` and `completion` where both are there, otherwise the one known pair beside
    which no other known name stands. Without `need_completion` a known context is enough.

    Raises:
        ValueError: says why it is not clear.
    """
    known = sides(names)
    others = known.keys() - ({"source"} if "target" not in known else set())
    if OWN.columns <= known.keys():
        pairs = [OWN]
    else:
        if not need_completion:
            others = others - COMPLETIONS
        pairs = [
            pair
            for pair in KNOWN
            if pair.context[0] in known
            and others <= pair.columns
            and (pair.completion in known or not need_completion)
        ]
        pairs = [pair for pair in pairs if pair.completion in known] or pairs
    if len({pair.context for pair in pairs}) != 1:
        raise ValueError(_unclear(known, need_completion))
    completion = pairs[0].completion if len(pairs) == 1 else None
    return Fields(
        tuple(known.get(name, name) for name in pairs[0].context),
        completion and known.get(completion, completion),
    )


def _unclear(known: dict[str, str], need_completion: bool) -> str:
    """Why no pair was recognised among these sides."""
    name_them = "name the columns by --fields CONTEXT:COMPLETION"
    if not known:
        return f"no column has a known name; {name_them}"
    if known.keys() <= COMPLETIONS:
        return f"context is missing; {name_them}"
    if need_completion and not known.keys() & COMPLETIONS:
        return f"completion is missing; {name_them}"
    return f"{', '.join(known.values())} are more than one context and one completion; {name_them}"
