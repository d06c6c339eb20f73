"""Reading and writing files so that nothing half-written is ever found under its name."""

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.errors import InputError
from common.json_text import JSONFault, parse_json
from common.text_files import TextFile

LEFTOVER = re.compile(r"\..*\.(?:[0-9a-f]{16}|[0-9]+)\.tmp")  # the second form is an older one


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """A file to fill ("w" for UTF-8 text, "wb" for bytes) that appears under `path` complete and on
    disk when the block ends, or not at all.

    What is no regular file, such as a device or a pipe, is written through; a link stays a link.

    Raises:
        InputError: the disk or the folder refuses; a file already at `path` stays as it was.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            with _open(path, mode) as file:
                yield file
        else:
            with _filling(Path(os.path.realpath(path)), mode) as file:
                yield file
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _filling(target: Path, mode: str) -> Iterator[IO]:
    """A new file in the folder of `target` that takes its place when the block ends."""
    # Random, as two containers on one volume may have equal process ids; names have a limit.
    start = target.name.encode()[:100].decode(errors="ignore")
    temporary = target.with_name(f".{start}.{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _open(path: Path, mode: str) -> IO:
    return path.open(mode) if "b" in mode else path.open(mode, encoding="utf-8", newline="\n")


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be made: {error.strerror or error}") from error


def delete_leftovers(folder: Path) -> None:
    """Delete what writers that were killed left in a folder into which nobody writes now."""
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def check_output(flag: str, output: str | Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Refuse to lose an input: raise InputError where `output`, a file that `flag` names, is a
    folder or one of the files that are read, which are named for the message."""
    output = Path(output)
    if output.is_dir():
        raise InputError(f"{flag} {output} is a folder; name a file to write")
    for name, path in inputs.items():
        if path is not None and _same_file(output, Path(path)):
            raise InputError(f"{flag} {output} is also {name} and would replace it; name another")


def check_output_folder(flag: str, folder: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """As `check_output`, where several files are written into a folder: none of the inputs may be
    in there, or be the folder."""
    for name, path in inputs.items():
        if path is not None and folder.is_dir() and folder.resolve() in _places(Path(path)):
            raise InputError(
                f"{flag} {folder} is the folder of {name}, whose files it could replace; name "
                "another"
            )


def _places(path: Path) -> tuple[Path, Path]:
    path = path.resolve()
    return path, path.parent


def _same_file(one: Path, other: Path) -> bool:
    """Whether both are there and one regular file, whatever their names."""
    try:
        return one.is_file() and one.samefile(other)
    except OSError:
        return False


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power cut, where the system can sync folders."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
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
