"""Which columns of a data file are the two sides of a row: by their names, or by `--fields`."""

from collections.abc import Callable, Iterable, Sequence
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
        help="Columns of the data; a + joins two of them. Default: the usual names (docs/data.md).",
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
    others = set(known) - ({"source"} if "target" not in known else set())
    if OWN.columns <= known.keys():
        pairs = [OWN]
    else:
        if not need_completion:
            others -= COMPLETIONS
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


class Columns:
    """The columns of a data file, as its first line or each of its rows names them.

    `names` are those named last, `fields` the sides among them, None until they are recognised.
    """

    def __init__(self, fields: Fields | None, need_completion: bool, also: Sequence[str]) -> None:
        self.names: list[str] = []
        self.fields = fields
        self.need_completion = need_completion
        self.also = also
        self._sides: set[str] | None = None  # known names that rows may have; None for any

    def of_row(self, names: Iterable[str]) -> Fields:
        """The sides of a row, which must be those of the first row.

        Raises:
            ValueError: they are not clear, or a known name was not in the first row.
        """
        self.names = list(names)
        if self.fields is None:
            self.fields = recognise(self.names, self.need_completion)
            if self.fields != OWN:
                self._sides = {*sides(self.names), *sides(self.fields.columns), "source"}
                self._sides |= set() if self.need_completion else COMPLETIONS
        elif self._sides is not None and (new := sides(self.names).keys() - self._sides):
            raise ValueError(f"{min(new)} is a column that the first row has not")
        return self.fields

    def of_header(self, names: Iterable[str]) -> Fields:
        """The sides of all rows.

        Raises:
            ValueError: they are not clear, are not there, or two columns have one name.
        """
        fields = self.of_row(names)
        needed = {fields.context[0], fields.completion if self.need_completion else None}
        for name in fields.columns | set(self.also):
            count = self.names.count(name)
            if count > 1 or (count == 0 and name in needed):
                raise ValueError(f"{count or 'no'} columns are named {name!r:.40}")
        return fields


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
