"""Standard output and error whose reader may leave: what is printed never ends a program."""

import io
import os
import sys
from typing import Any, TextIO


class LastingStream:
    """A text stream that drops what its reader no longer takes, and is otherwise the one it wraps.

    Letters that the reader's encoding lacks are written as escapes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write `text`, or drop it; return its length."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # the reader left, the disk is full, the stream is closed
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_lasting() -> None:
    """Let standard output and error be lasting streams from now on, closed ones included."""
    if sys.stdout is None or sys.stderr is None:
        # Files opened later must not get the numbers of the standard streams.
        while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if not isinstance(stream, LastingStream):
            setattr(sys, name, LastingStream(stream))
