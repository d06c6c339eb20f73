"""Data files of the usual forms as rows of a context and a completion, each file read once.

JSONL, a JSON array, CSV and TSV, plain or gzipped: docs/data.md has the rules.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.json_text import JSONArray, JSONFault, parse_json
from common.text_files import PANDAS, TextFile
from data.fields import COMPLETIONS, OWN, parse_fields, recognise, sides

Side = str | list[int]
Located = tuple[int, Any]  # the line that a row starts on, and the row

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
TABLES = {",": "CSV", ";": "CSV by semicolons", "\t": "TSV"}
# What pandas and Excel write for a value that is missing or could not be computed.
NO_VALUE = {"NaN", "nan", "<NA>", "#N/A", "#NAME?", "#REF!", "#VALUE!", "#DIV/0!"}
CHAT = (
    "holds chat messages, for which GPT-2 has no form; write a row for each answer, with the turns "
    "before it as context and the answer as completion"
)
JSON_ROW = 'a row looks like {"context": "name : Oak", "completion": "The Oak is a pub."}'
TABLE_ROW = "the first line names the columns, as context,completion does"


@dataclass(frozen=True, slots=True)
class Record:
    """A row as its file has it: the line it starts on, its number from 1 up, each side as text or
    token ids, and the columns of `also`."""

    line: int
    number: int
    context: Side
    completion: Side | None
    also: dict[str, Any]


class DataFile:
    """The rows of a data file, to be iterated over once; then `fields`, `form` and `sha256`, the
    hash of the bytes that were read, are known.

    Args:
        fields: what `--fields` says; None to recognise the columns by their names.
        need_completion: without it `completion` is None where it is absent or empty.
        also: columns to read beside the two sides, where they are there.

    Raises:
        InputError: names file, line and column, and says what to do.
    """

    def __init__(
        self,
        path: str | Path,
        fields: str | None = None,
        need_completion: bool = True,
        also: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.fields = None if fields is None else parse_fields(fields)
        if self.fields and need_completion and not self.fields.completion:
            raise InputError(f"--fields {fields} names no completion; give CONTEXT:COMPLETION")
        self.need_completion = need_completion
        self.also = also
        self.form = ""
        self.sha256 = ""
        self._names: list[str] = []
        self._sides: set[str] | None = None

    def __iter__(self) -> Iterator[Record]:
        number = 0
        with TextFile(self.path) as text:
            for number, (line, row) in enumerate(self._rows(text), start=1):
                yield self._record(line, number, row)
            self.sha256 = text.sha256
        if not number:
            raise InputError(f"{self.path} holds no rows; {self._example}")

    def __str__(self) -> str:
        return f"{self.form}, {self.fields}"

    @property
    def _is_table(self) -> bool:
        return self.form in TABLES.values()

    @property
    def _example(self) -> str:
        return TABLE_ROW if self._is_table else JSON_ROW

    def error(self, line: int, number: int, problem: str) -> InputError:
        """What is wrong with a row, which columns it has, and what it should look like."""
        place = f"line {line}" + (f", element {number}" if self.form == "JSON array" else "")
        found = ", ".join(f"{name!r:.30}" for name in self._names[:6])
        found = found and f"; columns found: {found}"
        return InputError(f"{self.path}, {place}: {problem}{found}; {self._example}")

    def _rows(self, text: TextFile) -> Iterator[Located]:
        """The rows by column, with the lines that they start on."""
        suffix = next((s for s in reversed(Path(self.path).suffixes) if s != ".gz"), "").lower()
        start = text.head.lstrip()[:1]
        if suffix in TABLE_SUFFIXES or (start not in b"[{" and suffix not in JSON_SUFFIXES):
            self.form = "CSV"
            return self._table(text, TABLE_SUFFIXES.get(suffix, ","))
        if start == b"[":
            self.form = "JSON array"
            return self._objects(self._array(text))
        self.form = "JSONL"
        return self._objects(self._lines(text))

    def _lines(self, text: TextFile) -> Iterator[Located]:
        for line in filter(str.strip, text.lines()):
            try:
                yield text.line, parse_json(line)
            except JSONFault as fault:
                hint = "; an object stands on one line" if line.strip() in "{[" else ""
                raise self.error(text.line, 0, f"{fault}{hint}") from fault

    def _array(self, text: TextFile) -> Iterator[Located]:
        number = 0
        try:
            for number, located in enumerate(JSONArray(text), start=1):  # noqa: B007
                yield located
        except JSONFault as fault:
            raise self.error(fault.line, number + 1, str(fault)) from fault

    def _objects(self, values: Iterable[Located]) -> Iterator[Located]:
        """The values, which must be objects, and have no sides that the first one has not."""
        for number, (line, row) in enumerate(values, start=1):
            if not isinstance(row, dict):
                self._names = []
                raise self.error(line, number, f"expected an object, found {row!r:.60}")
            if number == 1 or row.keys() != set(self._names):
                self._names = list(row)
                try:
                    self._check_names()
                except ValueError as error:
                    problem = f"{error}; {PANDAS}" if _is_nested(row) else str(error)
                    raise self.error(line, number, problem) from error
            yield line, row

    def _check_names(self) -> None:
        """Recognise the columns of the first row, and refuse sides that only a later one has.

        Raises:
            ValueError: says what is not clear.
        """
        known = sides(self._names).keys() - {"source"}
        if self.fields is None:
            chat = {"messages", "conversations"} & set(self._names)
            if chat and not known:
                raise ValueError(f"{min(chat)} {CHAT}")
            self.fields = recognise(self._names, self.need_completion)
            if self.fields != OWN:
                self._sides = known | sides(self.fields.columns).keys()
                self._sides |= set() if self.need_completion else COMPLETIONS
        elif self._sides is not None and not known <= self._sides:
            raise ValueError(f"{min(known - self._sides)} is a column that the first row has not")

    def _table(self, text: TextFile, usual: str) -> Iterator[Located]:
        """The records of a file whose first one names the columns."""
        lines = text.lines()
        head = next(filter(str.strip, lines), "")
        while head.count('"') % 2 and (line := next(lines, "")):
            head += line  # a name of several lines
        if not head:
            return
        delimiter = self._read_header(text, head, usual)
        records = csv.reader(lines, delimiter=delimiter, strict=True)
        number = 0
        while True:
            start = text.line + 1
            try:
                cells = next(records, None)
            except csv.Error as error:
                raise self.error(start, number, f"{error}: is a quote missing?") from error
            if cells is None:
                return
            if not cells:
                continue
            number += 1
            if len(cells) != len(self._names):
                raise self.error(
                    start,
                    number,
                    f"{len(cells)} cells under {len(self._names)} columns; a text with a "
                    f"{DELIMITERS[delimiter]} or a quote in it stands in quotes",
                )
            yield start, dict(zip(self._names, cells, strict=True))

    def _read_header(self, text: TextFile, head: str, usual: str) -> str:
        """Find the columns that the first line names; the delimiter is the one that shows them."""
        problems = {}
        for delimiter in dict.fromkeys((usual, *DELIMITERS)):
            reader = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter, strict=True)
            try:
                self._names = next(reader, [])
                self._check_header()
            except (ValueError, csv.Error) as error:
                problems[delimiter] = self._names, str(error)
            else:
                self.form = TABLES[delimiter]
                return delimiter
        # The most telling complaint is that about the most columns.
        self._names, problem = max(problems.values(), key=lambda found: len(found[0]))
        raise self.error(max(text.line, 1), 0, problem)

    def _check_header(self) -> None:
        if self.fields is None:
            self._check_names()
        assert self.fields is not None
        needed = {self.fields.context[0], self.fields.completion if self.need_completion else None}
        for name in self.fields.columns | set(self.also):
            count = self._names.count(name)
            if count > 1 or (count == 0 and name in needed):
                raise ValueError(f"{count or 'no'} columns are named {name!r:.40}")

    def _record(self, line: int, number: int, row: Mapping[str, Any]) -> Record:
        """The row's sides.

        Raises:
            InputError: one is absent, or is no side.
        """
        try:
            context, completion = self._context(row), self._completion(row)
        except ValueError as error:
            raise self.error(line, number, str(error)) from error
        also = {name: row[name] for name in self.also if name in row}
        return Record(line, number, context, completion, also)

    def _context(self, row: Mapping[str, Any]) -> Side:
        assert self.fields is not None
        first, *rest = self.fields.context
        parts = [self._side(row, first)]
        parts += [self._side(row, name) for name in rest if not self._absence(row.get(name))]
        if len(parts) == 1:
            return parts[0]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise ValueError(f"{' + '.join(self.fields.context)} must all be text to be joined")
        return "\n".join(texts)

    def _completion(self, row: Mapping[str, Any]) -> Side | None:
        name = self.fields and self.fields.completion
        if name is None or (not self.need_completion and self._absence(row.get(name))):
            return None
        return self._side(row, name)

    def _side(self, row: Mapping[str, Any], name: str) -> Side:
        value = row.get(name)
        problem = self._absence(value) or _fault(value)
        if problem:
            raise ValueError(f"{name if name.isidentifier() else repr(name)[:40]} {problem}")
        return value

    def _absence(self, value: object) -> str:
        """How a cell is empty; the empty string where it is not."""
        if value is None:
            return "is missing"
        if value == []:
            return "is an empty list"
        if isinstance(value, str) and not value.strip():
            return "is empty"
        if isinstance(value, float) and math.isnan(value):
            return "is NaN, which stands for a missing value"
        if self._is_table and value in NO_VALUE:
            return f"is {value}, which stands for a missing value (as a text it can be JSONL's)"
        return ""


def _fault(value: object) -> str:
    """Why a value is no side of a row; the empty string where it is one."""
    if isinstance(value, str):
        return "" if value.isascii() or _is_utf8(value) else "holds a lone surrogate, not text"
    if isinstance(value, list):
        return CHAT if any(isinstance(part, dict) for part in value) else ""
    hint = (
        "; a number that is meant as text stands in quotes" if type(value) in (int, float) else ""
    )
    if isinstance(value, dict):
        hint = f"; {PANDAS}"
    return f"must be text or a list of token ids, not {value!r:.40}{hint}"


def _is_nested(row: Mapping[str, Any]) -> bool:
    """Whether an object looks like a whole table, by rows or by columns."""
    values = [v[:1] if isinstance(v, list) else [v] for v in row.values()]
    return any(isinstance(part, dict | list) for value in values for part in value)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
