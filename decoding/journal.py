"""Batches that have been searched, kept beside the output until that is complete.

A decode that is stopped loses the batches it was in, and no others. Each process writes a file of
its own, `OUTPUT.partial.…`: first what decides the result, then a line for each batch. Batches do
not depend on the number of processes, so a decode may be resumed by more or fewer of them.
"""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import InputError
from decoding.beam_search import Hypothesis

Found = list[list[Hypothesis]]  # of each context of a batch, best first


class Journal:
    """The batches of one decode by their number: `found` holds those that are kept."""

    def __init__(self, output: Path, identity: Mapping[str, Any], resume: bool) -> None:
        """Open a file beside `output`, and with `resume` read those that are there.

        Args:
            identity: plain values that decide the result; they must be those of the kept files.

        Raises:
            InputError: a kept file is of another decode, or the folder refuses.
        """
        identity = json.loads(json.dumps(identity))
        self.found: dict[int, Found] = {}
        if resume:
            for path in kept_files(output):
                self.found |= _read(path, identity)
        path = output.with_name(f"{output.name}.partial.{secrets.token_hex(4)}")
        if output.exists() and not output.is_file():  # a pipe or a device, beside which is no room
            path = Path(os.devnull)
        with _naming_faults(output):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("w", encoding="utf-8", newline="\n")
        self._write(identity)

    def keep(self, number: int, found: Found) -> None:
        """Add a batch that has been searched."""
        self.found[number] = found
        self._write([number, [[[h.tokens, h.score, h.finished] for h in best] for best in found]])

    def _write(self, value: object) -> None:
        with _naming_faults(self.file.name):
            self.file.write(json.dumps(value) + "\n")
            self.file.flush()

    def close(self) -> None:
        with _naming_faults(self.file.name):
            self.file.close()


def kept_files(output: Path) -> list[Path]:
    """Return the files in which decodes into `output` have kept their batches."""
    prefix = f"{output.name}.partial."
    if not output.parent.is_dir():
        return []
    return sorted(path for path in output.parent.iterdir() if path.name.startswith(prefix))


def remove_kept_files(output: Path) -> None:
    """Delete them."""
    with _naming_faults(output):
        for path in kept_files(output):
            path.unlink(missing_ok=True)


def _read(path: Path, identity: Mapping[str, Any]) -> dict[int, Found]:
    """Return the whole lines of a kept file; a kill may have cut the last one, or the first."""
    found: dict[int, Found] = {}
    try:
        first, *lines = path.read_bytes().splitlines()
        then = json.loads(first)
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(then, dict) or then != identity:
        changed = [key for key in identity if not isinstance(then, dict) or key not in then]
        changed += [key for key in identity if key not in changed and then[key] != identity[key]]
        raise InputError(
            f"--resume: {path} is of a decode with another {changed[0] if changed else 'setting'}; "
            "put it back, or leave --resume out to start anew"
        )
    for line in lines:
        try:
            number, lists = json.loads(line)
            found[number] = [[Hypothesis(*_checked(h)) for h in best] for best in lists]
        except (ValueError, TypeError, RecursionError):
            break
    return found


def _checked(hypothesis: Any) -> tuple[list[int], float, bool]:
    tokens, score, finished = hypothesis
    if not isinstance(score, float) or not isinstance(finished, bool):
        raise ValueError(f"no hypothesis: {hypothesis}")
    return [int(token) for token in tokens], score, finished


@contextmanager
def _naming_faults(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
