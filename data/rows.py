"""Reading raw data files, plain or gzipped, and writing JSON lines: shared by the converters."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.errors import InputError, Parser
from common.files import check_output, replacing
from common.json_text import JSONFault, parse_json
from common.text_files import TextFile

Row = dict[str, Any]


def read_text(path: str | Path) -> str:
    """The whole file as text; InputError names file and line where it is none."""
    with TextFile(path) as text:
        return text.read()


def read_json(path: str | Path) -> Any:
    """The file's one JSON value; InputError names file and line where it is none."""
    try:
        return parse_json(read_text(path))
    except JSONFault as fault:
        raise InputError(f"{path}, line {fault.line}: {fault}") from fault


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> int:
    """Write one JSON object per line, all or nothing; returns how many."""
    count = 0
    with replacing(path) as file:
        for count, row in enumerate(rows, 1):  # noqa: B007
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def convert_main(rows_of: Callable[[str], Iterable[Row]], description: str) -> None:
    """The command line of a converter: SRC DST, one line saying what was written."""
    parser = Parser(description=description)
    parser.add_argument("src", help="raw file, plain or .gz")
    parser.add_argument("dst", help="JSONL file to write")
    args = parser.parse_args()
    check_output("dst", args.dst, {"src": args.src})
    print(f"{args.dst}: {write_jsonl(args.dst, rows_of(args.src)):,} rows")
