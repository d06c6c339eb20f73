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
from data.fields import Columns, parse_fields

Side = str | list[int]
Located = tuple[int, Any]  # the line that a row starts on, and the row

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
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
    """The rows of a data file, to be iterated over once; then `sha256`, the hash of the bytes that
    were read, is known, and `str` says the form and the columns.

    Args:
        fields: what `--fields` says; None to recognise the columns by their names.
        need_completion: without it `completion` is None where it is absent or empty.
        also: columns to read with the two sides, where they are there.

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
        named = None if fields is None else parse_fields(fields)
        if named and need_completion and not named.completion:
            raise InputError(f"--fields {fields} names no completion; give CONTEXT:COMPLETION")
        self.path = path
        self.form = ""
        self.sha256 = ""
        self.columns = Columns(named, need_completion, also)

    def __iter__(self) -> Iterator[Record]:
        number = 0
        with TextFile(self.path) as text:
            for number, (line, row) in enumerate(self._rows(text), start=1):
                try:
                    yield self._record(line, number, row)
                except ValueError as error:
                    raise self.error(line, number, str(error)) from error
            self.sha256 = text.sha256
        if not number:
            raise InputError(f"{self.path} holds no rows; {self._example}")

    def __str__(self) -> str:
        return f"{self.form}, {self.columns.fields}"

    @property
    def _is_table(self) -> bool:
        return self.form in TABLES.values()

    @property
    def _example(self) -> str:
        return TABLE_ROW if self._is_table else JSON_ROW

    def error(self, line: int, number: int, problem: str) -> InputError:
        """What is wrong with a row, which columns it has, and what it should look like."""
        place = f"line {line}" + (f", element {number}" if self.form == "JSON array" else "")
        found = ", ".join(f"{name!r:.30}" for name in self.columns.names[:6])
        found = found and f"; columns found: {found}"
        return InputError(f"{self.path}, {place}: {problem}{found}; {self._example}")

    # From the file to its rows by column, each with the line that it starts on.

    def _rows(self, text: TextFile) -> Iterator[Located]:
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
                if line.lstrip()[0] not in "{[":
                    hint = "; if this is a table, its name must end in .csv or .tsv"
                raise self.error(text.line, 0, f"{fault}{hint}") from fault

    def _array(self, text: TextFile) -> Iterator[Located]:
        number = 0
        try:
            for number, located in enumerate(JSONArray(text), start=1):  # noqa: B007
                yield located
        except JSONFault as fault:
            raise self.error(fault.line, number + 1, str(fault)) from fault

    def _objects(self, values: Iterable[Located]) -> Iterator[Located]:
        """The values, which must be objects with the columns of the first one."""
        names = None
        for number, (line, row) in enumerate(values, start=1):
            if not isinstance(row, dict):
                self.columns.names = []
                raise self.error(line, number, f"expected an object, found {row!r:.60}")
            if row.keys() != names:
                names = row.keys()
                try:
                    self.columns.of_row(names)
                except ValueError as error:
                    problem = _structure(row) or str(error)
                    raise self.error(line, number, problem) from error
            yield line, row

    def _table(self, text: TextFile, usual: str) -> Iterator[Located]:
        """The records of a file whose first one names the columns."""
        lines = text.lines()
        head = next(filter(str.strip, lines), "")
        while head.count('"') % 2 and (line := next(lines, "")):
            head += line  # a name of several lines
        if not head:
            return
        records = csv.reader(lines, delimiter=self._read_header(text, head, usual), strict=True)
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
                continue  # a blank line
            number += 1
            names = self.columns.names
            if len(cells) != len(names):
                problem = (
                    f"{len(cells)} cells under {len(names)} columns; a text with a delimiter or a "
                    "quote in it stands in quotes"
                )
                raise self.error(start, number, problem)
            yield start, dict(zip(names, cells, strict=True))

    def _read_header(self, text: TextFile, head: str, usual: str) -> str:
        """Find the columns that the first line names; the delimiter is the one that shows them."""
        problems: dict[str, tuple[list[str], str]] = {}
        for delimiter in dict.fromkeys((usual, *TABLES)):
            self.columns.names = []
            reader = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter, strict=True)
            try:
                self.columns.of_header(next(reader))
            except (ValueError, csv.Error) as error:
                problems[delimiter] = self.columns.names, str(error)
            else:
                self.form = TABLES[delimiter]
                return delimiter
        # The most telling complaint is that about the most columns.
        self.columns.names, problem = max(problems.values(), key=lambda found: len(found[0]))
        if head.lstrip()[0] in "{[":
            problem = "this starts as JSON does, whose name must not end in .csv or .tsv"
        raise self.error(text.line, 0, problem)

    # From a row by column to its sides. A ValueError says what is wrong with a cell.

    def _record(self, line: int, number: int, row: Mapping[str, Any]) -> Record:
        fields = self.columns.fields
        assert fields is not None
        first, *rest = fields.context
        parts = [self._side(row, first)]
        parts += [self._side(row, name) for name in rest if not self._absence(row.get(name))]
        context: Side = parts[0]
        if len(parts) > 1:
            texts = [part for part in parts if isinstance(part, str)]
            if len(texts) < len(parts):
                raise ValueError(f"{' + '.join(fields.context)} must all be text to be joined")
            context = "\n".join(texts)
        completion = None
        if fields.completion is not None and (
            self.columns.need_completion or not self._absence(row.get(fields.completion))
        ):
            completion = self._side(row, fields.completion)
        also = {name: row[name] for name in self.columns.also if name in row}
        return Record(line, number, context, completion, also)

    def _side(self, row: Mapping[str, Any], name: str) -> Side:
        value: Any = row.get(name)
        if problem := self._absence(value) or _fault(value):
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
    hint = f"; {PANDAS}" if isinstance(value, dict) else ""
    if type(value) in (int, float):
        hint = "; a number that is meant as text stands in quotes"
    return f"must be text or a list of token ids, not {value!r:.40}{hint}"


def _structure(row: Mapping[str, Any]) -> str:
    """What an object is that is no row: a chat, a whole table; the empty string for neither."""
    for name in ("messages", "conversations"):
        if name in row:
            return f"{name} {CHAT}"
    values = [v[:1] if isinstance(v, list) else [v] for v in row.values()]
    if any(isinstance(part, dict | list) for value in values for part in value):
        return f"the object is no row but looks like a whole table; {PANDAS}"
    return ""


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
