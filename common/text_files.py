"""Text files that are read once, from the first byte to the last: plain or gzipped, UTF-8, hashed.

Whatever a file is not is told by its first bytes or by the line that shows it, in one sentence.
"""

import gzip
import hashlib
import io
import os
import stat
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self

from common.errors import InputError

LONGEST_LINE = 2**20  # in characters; a row of this length takes 120 MB while it is encoded
FIFO_SECONDS = 30.0
CHUNK = 2**16  # characters
GZIP = b"\x1f\x8b"

# First bytes of what is no text in UTF-8, its name, and what to do about it.
PANDAS = 'write it as JSONL, in pandas by to_json(FILE, orient="records", lines=True)'
UTF_8 = "save it as UTF-8 (in Excel: CSV UTF-8; elsewhere: iconv -f UTF-16 -t UTF-8)"
NOT_TEXT = (
    (b"PAR1", "a Parquet file", PANDAS),
    (b"ARROW1", "an Arrow file", PANDAS),
    (b"\xff\xff\xff\xff", "an Arrow file", PANDAS),
    (
        b"PK\x03\x04",
        "an Excel workbook or another zip archive",
        "save it as CSV UTF-8, or unzip it",
    ),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook of the old kind", "save it as CSV UTF-8"),
    (b"\xff\xfe\0\0", "text in UTF-32", UTF_8.replace("16", "32")),
    (b"\xff\xfe", "text in UTF-16", UTF_8),
    (b"\xfe\xff", "text in UTF-16", UTF_8),
    (b"BZh", "packed by bzip2", "unpack it, or pack it by gzip"),
    (b"\xfd7zXZ", "packed by xz", "unpack it, or pack it by gzip"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd", "unpack it, or pack it by gzip"),
    (GZIP, "packed by gzip twice", "unpack it once"),
    (b"\x80\x04", "a pickle, which is never opened", PANDAS),
    (b"\x80\x05", "a pickle, which is never opened", PANDAS),
    (b"SQLite format 3", "a data base", PANDAS),
    (b"%PDF", "a PDF", "save its text as CSV or JSONL"),
)


class _Hashing(io.RawIOBase):
    """A file that hashes what is read from it, and fills every buffer while there is more."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view, filled = memoryview(buffer), 0
        while filled < len(view):
            data = self.file.read(len(view) - filled)
            if not data:
                break
            view[filled : filled + len(data)] = data
            filled += len(data)
        self.digest.update(view[:filled])
        return filled

    def close(self) -> None:
        self.file.close()
        super().close()


class TextFile:
    """A text file, open for one reading in a `with` block; a pipe will do.

    `head` holds its first bytes after unpacking, without a byte-order mark. `line` is the number of
    the line that was read last, `sha256` the hash of the file's own bytes, known once all is read.

    Raises:
        InputError: the file cannot be read, is no text, is not UTF-8, or has a line of more than
            `LONGEST_LINE` characters. Its text names file and line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.line = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack, self._naming_faults():
            self._raw = stack.enter_context(_Hashing(_open(Path(self.path))))
            packed = io.BufferedReader(self._raw, 2**16)
            binary: Any = packed
            if packed.peek(2)[:2] == GZIP:
                binary = gzip.GzipFile(fileobj=packed)
            head = binary.peek(64)
            for mark, kind, remedy in NOT_TEXT:
                if head.startswith(mark):
                    raise InputError(f"{self.path} is {kind}; {remedy}")
            if b"\0\0" in (head[:4:2], head[1:4:2]):
                raise InputError(f"{self.path} is text in UTF-16 or no text at all; {UTF_8}")
            self.head = head.removeprefix(b"\xef\xbb\xbf")
            # Bytes that are not UTF-8 become lone surrogates, which `_checked` finds.
            self._text = io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline="")
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @property
    def sha256(self) -> str:
        return self._raw.digest.hexdigest()

    def lines(self) -> Iterator[str]:
        """Every line with its end, which is LF, CRLF or CR."""
        with self._naming_faults():
            while line := self._text.readline(LONGEST_LINE + 1):
                self.line += 1
                if len(line) > LONGEST_LINE:
                    raise self.error(f"longer than {LONGEST_LINE:,} characters")
                yield self._checked(line)

    def chunks(self) -> Iterator[str]:
        """The text in pieces, whatever its lines."""
        with self._naming_faults():
            self.line = 1
            while chunk := self._text.read(CHUNK):
                yield self._checked(chunk)
                self.line += chunk.count("\n")

    def read(self) -> str:
        """The whole text."""
        return "".join(self.chunks())

    def error(self, problem: str, line: int | None = None) -> InputError:
        """What is wrong with a line, by default the one that was read last."""
        return InputError(f"{self.path}, line {line or self.line}: {problem}")

    def _checked(self, text: str) -> str:
        if text.isascii():
            return text
        try:
            text.encode()
        except UnicodeEncodeError as error:
            line = max(self.line, 1) + text.count("\n", 0, error.start)
            byte = ord(text[error.start]) - 0xDC00
            raise self.error(f"not UTF-8 (byte 0x{byte:02x}); save it as UTF-8", line) from error
        return text

    @contextmanager
    def _naming_faults(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self.path} cannot be read: {reason}") from error


def check_shareable(path: str | Path, processes: int) -> None:
    """Refuse a pipe for several processes, which would each get some of its bytes."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # reading it will say what is wrong
    if processes > 1 and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(
            f"{path} is a pipe, of which {processes} processes would each get a part; write it to "
            "a file first"
        )


def _open(path: Path) -> IO[bytes]:
    """The file, open for reading; a FIFO must get a writer within `FIFO_SECONDS`."""
    if not path.is_fifo():
        return path.open("rb", buffering=0)
    started = time.monotonic()
    waiting = threading.Timer(FIFO_SECONDS, _end_wait, [path])
    waiting.start()
    try:
        file = path.open("rb", buffering=0)
    finally:
        waiting.cancel()
    if time.monotonic() - started >= FIFO_SECONDS:
        raise OSError(f"it is a FIFO, and nobody wrote to it for {FIFO_SECONDS:.0f} s")
    return file


def _end_wait(fifo: Path) -> None:
    """Open a FIFO for writing, so that who waits in opening it for reading returns."""
    with suppress(OSError):
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
