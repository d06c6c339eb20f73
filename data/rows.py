"""Reading raw data files, plain or gzipped, and writing JSON lines: shared by the converters."""

import argparse
import gzip
import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import replacing

Row = dict[str, Any]


def read_text(path: str | Path) -> str:
    """The whole file as text: UTF-8, unpacked when it starts as a gzip file does.

    Raises InputError naming the file when it is missing, cut off or not UTF-8.
    """
    try:
        raw = Path(path).read_bytes()
        if raw.startswith(b"\x1f\x8b"):
            raw = gzip.decompress(raw)
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 ({error.reason}); re-save it") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def read_json(path: str | Path) -> Any:
    """The file's one JSON value; InputError names file and line of a syntax error."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> int:
    """Write one JSON object a line, all or nothing; returns how many."""
    count = 0
    with replacing(path) as file:
        for count, row in enumerate(rows, 1):  # noqa: B007
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def convert_main(rows_of: Callable[[str], Iterable[Row]], description: str) -> None:
    """The command line of a converter: SRC DST, one line saying what was written."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("src", help="raw file, plain or .gz")
    parser.add_argument("dst", help="JSONL file to write")
    args = parser.parse_args()
    print(f"{args.dst}: {write_jsonl(args.dst, rows_of(args.src)):,} rows")
