"""Fetch the public files: `python -m data.download GROUP FOLDER`, GROUP a key of downloads.json.

Looks first into the local mirror `$DATA_DIR/GROUP/FILE` (or FILE.gz), then at `$MIRROR/GROUP/FILE`
(a folder or a web address), then at the public addresses (`$HF_ENDPOINT` stands in for
https://huggingface.co). A broken transfer is taken up where it stopped; a file appears under its
name only when its checksum is right, and one that is there already is only checked.
"""

import argparse
import gzip
import hashlib
import http.client
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from common.errors import InputError, run

MANIFEST = Path(__file__).with_name("downloads.json")
HUB = "https://huggingface.co"
CHUNK = 1 << 20
TIMEOUT = 30  # seconds without a byte
TRIES = 3


class Unavailable(Exception):
    """One source does not give the file; the text says why."""


def checksum(path: Path, kind: str) -> str:
    """Hexadecimal digest of a file: `sha256`, or `git`, the id git gives a file's content."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1()
    if kind == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def matches(path: Path, expected: str | None) -> bool:
    """Whether the file is there with the checksum `kind:digest`; without one, whether it is there.

    Large weights have no published checksum here: for them the reader's own checks must do.
    """
    if expected is None or not path.is_file():
        return path.is_file()
    kind, _, digest = expected.partition(":")
    return checksum(path, kind) == digest


def copy_local(source: Path, part: Path) -> None:
    """Copy `source`, or unpack `source`.gz, into `part`."""
    packed = source.with_name(source.name + ".gz")
    opener, found = (open, source) if source.is_file() else (gzip.open, packed)
    if not found.is_file():
        raise Unavailable("not there")
    try:
        with opener(found, "rb") as reader, part.open("wb") as writer:
            shutil.copyfileobj(reader, writer, CHUNK)
    except (OSError, EOFError, zlib.error) as error:
        part.unlink(missing_ok=True)
        raise Unavailable(str(error)) from error


def transfer(url: str, part: Path) -> None:
    """Append to `part` what it lacks of the file at `url`; start over if the server cannot resume.

    Raises Unavailable where the server refuses or the connection breaks; `part` keeps what came.
    """
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urlopen(request, timeout=TIMEOUT) as response:
            receive(response, part)
    except HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return  # all of it had come before
        if error.code == 416:
            part.unlink()
        raise Unavailable(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(str(getattr(error, "reason", error)) or repr(error)) from error


def receive(response: http.client.HTTPResponse, part: Path) -> None:
    """Save the body, behind what is there if it is the rest; a body cut short is an error."""
    announced = int(response.headers.get("Content-Length") or 0)
    with part.open("ab" if response.status == 206 else "wb") as file:
        start = file.tell()
        shutil.copyfileobj(response, file, CHUNK)
        if file.tell() - start < announced:
            raise Unavailable(f"the connection broke after {file.tell():,} bytes")


def download(url: str, part: Path) -> None:
    """`transfer`, taken up again where the connection breaks."""
    for attempt in range(1, TRIES + 1):
        try:
            return transfer(url, part)
        except Unavailable:
            if attempt == TRIES or not part.exists():
                raise


def sources(group: str, name: str, urls: list[str]) -> Iterator[str]:
    """Where to look for the file, in order: folders and web addresses."""
    for variable in ("DATA_DIR", "MIRROR"):
        if os.environ.get(variable):
            yield f"{os.environ[variable].rstrip('/')}/{group}/{name}"
    for url in urls:
        yield url.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"))


def fetch(group: str, name: str, entry: dict, folder: Path) -> Path:
    """Put the file into `folder`, from the first source that has it with the right checksum.

    Raises InputError that names the file, where it belongs, and why each source failed.
    """
    target, expected = folder / name, entry["checksum"]
    if matches(target, expected):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.part"
    failures = [f"{target} is another file: its checksum differs"] if target.exists() else []
    for source in sources(group, name, entry["urls"]):
        try:
            if "://" in source:
                download(source, part)
            else:
                copy_local(Path(source), part)
        except Unavailable as reason:
            failures.append(f"{source}: {reason}")
            continue
        if matches(part, expected):
            os.replace(part, target)
            return target
        part.unlink()
        failures.append(f"{source}: another file, its checksum differs")
    raise InputError(
        f"cannot get {group}/{name}; put it at {target} yourself, or name a folder that holds "
        f"{group}/{name} by DATA_DIR ({'; '.join(failures)})"
    )


def main() -> None:
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=manifest)
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", nargs="*", help="only these of the group")
    args = parser.parse_args()
    for name in args.files or manifest[args.group]:
        if name not in manifest[args.group]:
            raise InputError(f"{args.group} has no file {name}: {', '.join(manifest[args.group])}")
        target = fetch(args.group, name, manifest[args.group][name], args.folder)
        note = "checksum right" if manifest[args.group][name]["checksum"] else "checksum unknown"
        print(f"{target}: {target.stat().st_size:,} bytes, {note}")


if __name__ == "__main__":
    run(main)
