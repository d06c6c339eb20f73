"""JSON values of a text, and the elements of an array one at a time."""

import json
import re
from collections.abc import Iterator
from typing import Any

from common.text_files import LONGEST_LINE, TextFile

BLANKS = re.compile(r"[ \t\r\n]*")


class JSONFault(ValueError):
    """What keeps a text from being JSON: its syntax, a key that an object names twice, or a depth
    or a number beyond what can be read. `line` is where, counted from 1."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(f"not JSON ({reason})")
        self.line = line


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        JSONFault: it is none.
    """
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, character {error.colno}"
        raise JSONFault(reason, error.lineno) from error
    except (ValueError, RecursionError) as error:
        raise JSONFault(_reason(error)) from error


class JSONArray:
    """The elements of the one array that a text file holds, each with the line that it starts on.

    Neither the text nor its values are held: elements may have `LONGEST_LINE` characters each.
    """

    def __init__(self, text: TextFile) -> None:
        self.line = 1
        self._chunks = text.chunks()
        self._text = ""  # what is being parsed, up to `_at` it is done
        self._at = 0

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Raises JSONFault."""
        self._take("[")
        closed = self._next() == "]"
        while not closed:
            self._next()
            yield self.line, self._element()
            closed = self._next() == "]"
            if not closed:
                self._take(",")
        self._take("]")
        if self._next():
            raise JSONFault("text after the end of the array", self.line)

    def _next(self) -> str:
        """The next character that is not blank, "" at the end of the text."""
        while True:
            self._go(BLANKS.match(self._text, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def _take(self, mark: str) -> None:
        found = self._next()
        if found != mark:
            raise JSONFault(f"expected {mark!r}, found {found or 'the end'!r}", self.line)
        self._go(self._at + 1)

    def _element(self) -> Any:
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                # Perhaps only because the text was read up to the middle of the element.
                if len(self._text) - self._at <= LONGEST_LINE and self._read():
                    continue
                self._go(getattr(error, "pos", self._at))
                raise JSONFault(_reason(error), self.line) from error
            self._go(end)
            return value

    def _go(self, place: int) -> None:
        self.line += self._text.count("\n", self._at, place)
        self._at = place

    def _read(self) -> bool:
        """Read more of the text; whether there was more."""
        chunk = next(self._chunks, "")
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).partition(":")[0]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.40} stands twice in one object")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)
