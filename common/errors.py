"""What the user can mend: one sentence on stderr and exit code 2, never a traceback."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from common.streams import make_lasting


class InputError(Exception):
    """A mistake in the user's input. Its text is one sentence that names the file, line, tensor or
    flag at fault and says what to do about it."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument as every other mistake is said, in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}{self._flag_meant(message)}; --help lists every flag")

    def _flag_meant(self, message: str) -> str:
        """The flag that argparse's message about an unknown one was probably meant to be."""
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        close = unknown and difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
        return f" (did you mean {close[0]}?)" if close else ""


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: its return value, 2 after printing an `InputError`, or 130
    after an interrupt.

    Any other exception is a fault of the program and keeps its traceback.
    """
    make_lasting()
    try:
        sys.exit(main())
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")  # at once, as processes share a terminal
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
