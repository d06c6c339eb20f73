"""Fetch the public files: `python -m data.download GROUP FOLDER`, GROUP a key of downloads.json.

Looks first into the local mirror `$DATA_DIR/GROUP/FILE` (or FILE.gz), then at `$MIRROR/GROUP/FILE`
(a folder or a web address), then at the public addresses (`$HF_ENDPOINT` stands in for
https://huggingface.co). A broken transfer is taken up where it stopped; a file appears under its
name only when its checksum is right, and one that is there already is only checked. No file may be
larger than downloads.json says, or take longer than a minute and a second for every 20 kB.
"""

import argparse
import gzip
import hashlib
import http.client
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from common.errors import InputError, Parser, run
from common.files import make_folder, sync_folder
from common.locks import locked

MANIFEST = Path(__file__).with_name("downloads.json")
HUB = "https://huggingface.co"
CHUNK = 1 << 20
TIMEOUT = 30  # seconds without a byte
SECONDS, LEAST_SPEED = 60, 20_000  # a file may take so long, and a second for every 20 kB
TRIES = 3


class Unavailable(Exception):
    """One source does not give the file; the text says why."""


class TooLarge(Unavailable):
    """It gives more than the file has; nothing of it is right."""


@dataclass(frozen=True)
class Limits:
    """What a file may cost: bytes, by downloads.json, and seconds from when it was begun."""

    most_bytes: int
    begun: float

    @property
    def seconds(self) -> float:
        return SECONDS + self.most_bytes / LEAST_SPEED

    @property
    def deadline(self) -> float:
        return self.begun + self.seconds


def checksum(path: Path, kind: str) -> str:
    """Hexadecimal digest of a file: `sha256`, or `git`, the id git gives a file's content."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1()
    if kind == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def matches(path: Path, expected: str) -> bool:
    """Whether the file is there with the checksum `kind:digest`."""
    if not path.is_file():
        return False
    kind, _, digest = expected.partition(":")
    return checksum(path, kind) == digest


def copy(read: Callable[[int], bytes], file: BinaryIO, limits: Limits) -> None:
    """Append what `read` gives to the file.

    Raises:
        Unavailable: it is more than the limits allow, or takes longer.
    """
    while block := read(CHUNK):
        if file.tell() + len(block) > limits.most_bytes:
            raise TooLarge(f"another file, it is larger than {limits.most_bytes:,} bytes")
        file.write(block)
        if time.monotonic() > limits.deadline:
            raise Unavailable(f"too slow, {file.tell():,} bytes in {limits.seconds:,.0f} s")


def copy_local(source: Path, part: Path, limits: Limits) -> None:
    """Copy `source`, or unpack `source`.gz, into `part`."""
    packed = source.with_name(source.name + ".gz")
    opener, found = (open, source) if source.is_file() else (gzip.open, packed)
    if not found.is_file():
        raise Unavailable("not there")
    try:
        with opener(found, "rb") as reader, part.open("wb") as writer:
            copy(reader.read, writer, limits)
    except (OSError, EOFError, zlib.error, Unavailable) as error:
        part.unlink(missing_ok=True)
        raise Unavailable(str(error)) from error


def transfer(url: str, part: Path, limits: Limits) -> None:
    """Append to `part` what it lacks of the file at `url`; start over if the server cannot resume.

    Raises:
        Unavailable: the server refuses, the connection breaks or a limit is reached; `part` keeps
            what came, unless it was too much.
    """
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urlopen(request, timeout=TIMEOUT) as response:
            receive(response, part, limits)
    except HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return  # all of it had come before
        if error.code == 416:
            part.unlink()
        raise Unavailable(f"HTTP {error.code} {error.reason}") from error
    except TooLarge:
        part.unlink()
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unavailable(str(getattr(error, "reason", error)) or repr(error)) from error


def receive(response: http.client.HTTPResponse, part: Path, limits: Limits) -> None:
    """Save the body, appended to what came before if it is the rest; one that is cut short or
    larger than allowed is an error."""
    length = response.headers.get("Content-Length", "0")
    if not (length.isascii() and length.isdigit()):
        raise Unavailable(f"its Content-Length is {length!r:.40}, not a number")
    with part.open("ab" if response.status == 206 else "wb") as file:
        start, announced = file.tell(), int(length)
        if start + announced > limits.most_bytes:
            raise TooLarge(f"another file, it has {start + announced:,} bytes")
        copy(response.read1, file, limits)
        if file.tell() - start < announced:
            raise Unavailable(f"the connection broke after {file.tell():,} bytes")


def download(url: str, part: Path, limits: Limits) -> None:
    """`transfer`, taken up again where the connection breaks."""
    for attempt in range(1, TRIES + 1):
        try:
            return transfer(url, part, limits)
        except Unavailable:
            if attempt == TRIES or not part.exists() or time.monotonic() > limits.deadline:
                raise


def sources(group: str, name: str, urls: list[str]) -> Iterator[str]:
    """Where to look for the file, in order: folders and web addresses."""
    for variable in ("DATA_DIR", "MIRROR"):
        if os.environ.get(variable):
            yield f"{os.environ[variable].rstrip('/')}/{group}/{name}"
    for url in urls:
        yield url.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"))


def put(part: Path, target: Path) -> None:
    """Give the file its name, once it is on disk."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    sync_folder(target.parent)


def fetch(group: str, name: str, entry: dict, folder: Path) -> Path:
    """Put the file into `folder`, from the first source that has it with the right checksum.

    Raises InputError that names the file, where it belongs, and why each source failed.
    """
    target, expected = folder / name, entry["checksum"]
    if matches(target, expected):
        return target
    make_folder(target.parent)
    with locked(folder, str(folder), "download"):  # two would write into one part
        return target if matches(target, expected) else get(group, name, entry, folder)


def get(group: str, name: str, entry: dict, folder: Path) -> Path:
    """As `fetch`, for the one that has the folder to itself and has no such file in it."""
    target, expected = folder / name, entry["checksum"]
    part = folder / f"{name}.part"
    failures = [f"{target} is another file: its checksum differs"] if target.exists() else []
    for source in sources(group, name, entry["urls"]):
        limits = Limits(entry["most_bytes"], time.monotonic())
        try:
            if "://" in source:
                download(source, part, limits)
            else:
                copy_local(Path(source), part, limits)
        except Unavailable as reason:
            failures.append(f"{source}: {reason}")
            continue
        if matches(part, expected):
            put(part, target)
            return target
        part.unlink()
        failures.append(f"{source}: another file, its checksum differs")
    raise InputError(
        f"cannot get {group}/{name}; put it at {target} yourself, or name a folder that holds "
        f"{group}/{name} by DATA_DIR ({'; '.join(failures)})"
    )


def main() -> None:
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=manifest)
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", nargs="*", help="only these of the group")
    args = parser.parse_args()
    for name in args.files or manifest[args.group]:
        if name not in manifest[args.group]:
            raise InputError(f"{args.group} has no file {name}: {', '.join(manifest[args.group])}")
        target = fetch(args.group, name, manifest[args.group][name], args.folder)
        print(f"{target}: {target.stat().st_size:,} bytes, checksum right")


if __name__ == "__main__":
    run(main)
