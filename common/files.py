"""Reading and writing files so that nothing half-written is ever found under its name."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.errors import InputError
from common.json_text import JSONFault, parse_json
from common.text_files import TextFile


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """A file to fill ("w" for UTF-8 text, "wb" for bytes) that appears under `path` complete and on
    disk when the block ends, or not at all.

    Raises:
        InputError: the disk or the folder refuses; a file already at `path` stays as it was.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open(mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if beside.exists():
            beside.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power cut; where folders cannot be opened, nothing."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    with replacing(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


def read_json_lines(path: str | Path) -> list[dict]:
    """The objects of a JSONL file, one a line; blank lines are skipped.

    Raises:
        InputError: names file and line of what is not one JSON object in UTF-8.
    """
    return [row for _, row in numbered_json_lines(path)]


def numbered_json_lines(path: str | Path) -> list[tuple[int, dict]]:
    """The same with the number of each object's line."""
    rows = []
    with TextFile(path) as text:
        for line in filter(str.strip, text.lines()):
            try:
                row = parse_json(line)
            except JSONFault as fault:
                raise text.error(str(fault)) from fault
            if not isinstance(row, dict):
                raise text.error(f"expected an object, found {row!r:.60}")
            rows.append((text.line, row))
    if not rows:
        raise InputError(f"{path} is empty; it needs one JSON object a line")
    return rows
